"""The processes of a pipeline that is measured: what they train, and what they time."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from man_mm.backbones import find_backbone, find_units
from man_mm.core import LocalLearner, LocalModule, MemoryBank
from man_mm.core.partition import ends_of_stages
from man_mm.core.storages import tensor_bytes
from man_mm.engine.config_files import load_config
from man_mm.engine.quiet import quiet
from man_mm.measure.synthetic_batch import synthetic_batch
from man_mm.parallel import ModulePipeline
from man_mm.parallel.channel import Channel
from man_mm.parallel.prediction import Link, group_modules

from .schemes import parse_scheme, scheme_config
from .training_steps import build_model, build_wrapper

_WARM = 2  # batches until the pipeline is full
_BIG = 2**24  # bytes
_TIMEOUT = timedelta(minutes=20)


@dataclass(frozen=True)
class PipelineSettings:
    """What is measured of a pipeline.

    Attributes:
        config: Path of the config.
        size: Height and width of the images in pixels.
        batch: Images in a step.
        modules: Modules of equal memory.
        processes: Processes that share them.
        steps: Timed batches a round.
        repeats: Rounds.
        in_flight: Batches that a process may be ahead of the next one.
        options: Settings that override the config, each ``KEY=VALUE``.
    """

    config: str
    size: tuple[int, int] = (224, 224)
    batch: int = 4
    modules: int = 8
    processes: int = 2
    steps: int = 6
    repeats: int = 5
    in_flight: int = 2
    options: tuple[str, ...] = ()


class Trainer:
    """Trains a model on one batch again and again, alone or as a rank of a pipeline.

    Args:
        settings: What is trained, and how often.
        group: Processes that share the modules.
        sizes: Modules of each. Defaults to all on the only one.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
    ) -> None:
        shape = (settings.batch, 3, *settings.size)
        scheme = parse_scheme(f'local+K={settings.modules}')
        cfg = scheme_config(
            load_config(settings.config, settings.options), scheme, shape
        )
        self.model = build_model(cfg.model)
        wrapper = build_wrapper(self.model, cfg)
        self.learner: LocalLearner = wrapper.learner
        self.pipeline = ModulePipeline(
            self.learner, sizes, read_by_neck(self.model), settings.in_flight, group
        )
        self.optimizer = wrapper.optimizer
        own = set(self.pipeline.params())
        for options in self.optimizer.param_groups:
            options['params'] = [p for p in options['params'] if p in own]
        self.batch = synthetic_batch(self.model, shape)
        self.ends: list[float] = []  # when each module was updated

    def step(self) -> None:
        """Trains on the batch."""
        data = self.model.data_preprocessor(self.batch, True)
        self.ends = []

        def run() -> Tensor:
            losses = self.model(**data, mode='loss')
            return self.model.parse_losses(losses)[0]

        self.pipeline.step(run, data['data_samples'], self._backward)

    def _backward(self, loss: Tensor, module: LocalModule, complete: bool) -> None:
        loss.backward()
        if complete:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ends.append(time.process_time())

    def module_seconds(self) -> list[float]:
        """Processor time of each module in one step."""
        start = time.process_time()
        self.step()
        starts = [start, *self.ends]
        return [end - start for start, end in zip(starts, self.ends, strict=False)]

    def packet_bytes(self) -> list[int]:
        """Bytes that a rank would send after each module but the last."""
        read, sizes = {}, []
        bank = self.learner.bank
        bank = MemoryBank() if bank is None else bank

        def keep(name: str, _unit: nn.Module, _args: tuple, output: Tensor) -> None:
            read[name] = output

        def count(_unit: nn.Module, args: tuple) -> None:
            moments = [bank.pending(name) for name in bank]
            sizes.append(tensor_bytes([args[0], read, dict(bank), moments]))

        with ExitStack() as stack:
            for name in read_by_neck(self.model):
                unit = self.model.get_submodule(name)
                hook = unit.register_forward_hook(partial(keep, name))
                stack.callback(hook.remove)
            for module in self.learner.modules[1:]:
                start = self.model.get_submodule(module.parts[0])
                stack.callback(start.register_forward_pre_hook(count).remove)
            self.step()
        return sizes


def read_by_neck(model: nn.Module) -> list[str]:
    """Ends of stages that the backbone returns, all but the last one."""
    _, backbone = find_backbone(model)
    stages = getattr(backbone, 'out_indices', range(100))
    ends = ends_of_stages(find_units(model))
    return [unit.name for unit, _ in ends if unit.stage in stages]


def measure_rank(rank: int, settings: PipelineSettings, folder: str) -> None:
    """Runs one process; rank 0 leaves what was measured in ``folder/result.json``."""
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=settings.processes,
        timeout=_TIMEOUT,
    )
    cpus = sorted(os.sched_getaffinity(0))
    _use([cpus[rank % len(cpus)]])
    world = dist.group.WORLD
    alone = dist.new_group([rank], use_local_synchronization=True)
    with quiet():
        single = Trainer(settings, alone)
    single.step()  # makes the optimizer's state
    sent = single.packet_bytes()
    modules = [single.module_seconds() for _ in range(3)] if rank == 0 else []
    plan = [group_modules(_medians(modules), settings.processes) if modules else None]
    dist.broadcast_object_list(plan)
    with quiet():
        piped = Trainer(settings, world, plan[0])
    result = dict(
        cuts=[module.cut for module in single.learner.modules[:-1]],
        sizes=plan[0],
        packet_bytes=sent,
        link=vars(measure_link(rank)),
        rounds=[],
    )
    for number in range(settings.repeats):
        row = measure_round(rank, settings, single, piped, cpus)
        result['rounds'].append(row)
        if rank == 0:
            print(
                f'round {number + 1} of {settings.repeats}: one process '
                f'{row["wall"]["alone"]:.2f} s, {settings.processes} processes '
                f'{row["wall"]["pipeline"]:.2f} s a batch',
                flush=True,
            )
    totals = [None] * settings.processes
    dist.all_gather_object(totals, piped.pipeline.sent_bytes)
    result['sent_bytes'] = totals[:-1]
    if rank == 0:
        with open(f'{folder}/result.json', 'w') as file:
            json.dump(result, file)
    dist.barrier()


def measure_round(
    rank: int,
    settings: PipelineSettings,
    single: Trainer,
    piped: Trainer,
    cpus: list[int],
) -> dict:
    """Seconds of a batch in each way, one after the other.

    Returns:
        By clock, ``'wall'`` or ``'cpu'`` for processor time: ``alone`` in one process
        with one thread; ``copies``, of one process while as many others do the same;
        ``pipeline``, in processor time of its slowest rank; ``threads`` in one process
        on all processors, by the wall. And ``modules``, the processor time of each.
    """
    row = dict(wall={}, cpu={})
    dist.barrier()
    if rank == 0:
        row['modules'] = _medians(
            [single.module_seconds() for _ in range(settings.steps)]
        )
        row['wall']['alone'], row['cpu']['alone'] = _times(single.step, settings.steps)
        _use(cpus)
        row['wall']['threads'], _ = _times(single.step, settings.steps)
        _use(cpus[:1])
    dist.barrier()
    row['wall']['copies'], row['cpu']['copies'] = _times(single.step, settings.steps)
    dist.barrier()
    ends = []
    for _ in range(_WARM + settings.steps + settings.in_flight):
        piped.step()
        ends.append((time.perf_counter(), time.process_time()))
    # After these, earlier ranks have nothing more to do, and slow nobody down.
    first, last = ends[_WARM - 1], ends[_WARM - 1 + settings.steps]
    pace = [(b - a) / settings.steps for a, b in zip(first, last, strict=True)]
    piped.pipeline.flush()
    paces = [None] * settings.processes
    dist.all_gather_object(paces, pace)
    row['wall']['pipeline'] = paces[-1][0]
    row['cpu']['pipeline'] = max(cpu for _, cpu in paces)
    return row


def measure_link(rank: int, repeats: int = 9) -> Link:
    """What the second rank waits for packets of the first one that are there."""
    seconds = {}
    for size in (4, _BIG):
        waits = []
        for _ in range(repeats):
            channel = Channel(torch.device('cpu'))
            if rank == 0:
                channel.send({'maps': {'map': torch.zeros(size // 4)}})
            dist.barrier()
            start = time.perf_counter()
            if rank == 1:
                channel.receive()
            waits.append(time.perf_counter() - start)
            channel.flush()
            dist.barrier()
        seconds[size] = min(waits)  # others may be using the processors
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, seconds)
    small, big = found[1].values()
    return Link(small, _BIG / max(big - small, 1e-9))


def _times(fn: Callable[[], object], repeats: int) -> list[float]:
    """Median wall time and processor time of a call."""
    rows = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        fn()
        rows.append([time.perf_counter() - wall, time.process_time() - cpu])
    return _medians(rows)


def _medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _use(cpus: list[int]) -> None:
    """Limits this process to some processors, with a thread on each."""
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(len(cpus))
