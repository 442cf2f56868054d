"""What is alive in a training step after each operation, and what is running."""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from man_mm.core import LocalModule
from man_mm.core.returned import tensor_of
from man_mm.engine.config_files import load_config
from man_mm.engine.quiet import quiet
from man_mm.measure.memory import measure_memory
from man_mm.measure.synthetic_batch import synthetic_batch

from .records import versions
from .schemes import END_TO_END, LOCAL, parse_scheme, scheme_config
from .training_steps import build_model, build_wrapper

SCHEMES = (END_TO_END, LOCAL)
_DETAIL = 0.002  # of the peak; smaller changes are not stored


class Recorder:
    """Collects what is alive after each operation, and what is running.

    Attributes:
        moments: Seconds since the start, bytes, index of the module, and phase.
    """

    def __init__(self) -> None:
        self.moments: list[tuple[float, int, int, str]] = []
        self._running = (0, 'forward')
        self._start = time.perf_counter()

    def start(self) -> None:
        """Sets the clock to zero."""
        self._start = time.perf_counter()

    def record(self, total: int) -> None:
        """Notes the bytes that are alive."""
        seconds = time.perf_counter() - self._start
        self.moments.append((seconds, total, *self._running))

    @contextmanager
    def watching(self, model, modules: list[LocalModule]):
        """Follows which module of a model runs, and what it does."""
        with ExitStack() as stack:
            for module in modules:
                start = model.get_submodule(module.parts[0])
                enter = partial(self._enter, module.index)
                stack.callback(start.register_forward_pre_hook(enter).remove)
                end = model.get_submodule(module.cut)
                leave = partial(self._leave, module.index)
                stack.callback(end.register_forward_hook(leave, prepend=True).remove)
            yield

    def _enter(self, index: int, *_: object) -> None:
        self._running = (index, 'forward')

    def _leave(self, index: int, _module: object, _args: object, output) -> None:
        self._running = (index, 'loss')
        output = tensor_of(output)
        if output.requires_grad:  # not so in the first run of an exact step
            output.register_hook(lambda _: self._back(index))

    def _back(self, index: int) -> None:
        self._running = (index, 'backward')


def record_step(cfg, scheme: str, shape: tuple[int, ...], modules=None) -> tuple:
    """Trains the second step of a config's model by a scheme, and records it.

    Args:
        cfg: Config of a model trained by local learning.
        scheme: As in `man_mm.benchmark.schemes`.
        shape: Shape ``(N, C, H, W)`` of the batch.
        modules: Modules to tell apart. Defaults to those that the scheme trains.

    Returns:
        The moments that matter, and the modules.
    """
    cfg = scheme_config(cfg, parse_scheme(scheme), shape)
    model = build_model(cfg.model)
    with quiet():
        wrapper = build_wrapper(model, cfg)
    if modules is None:
        modules = wrapper.learner.modules
    batch = synthetic_batch(model, shape)
    model.train_step(copy.deepcopy(batch), wrapper)  # makes the optimizer's state
    recorder = Recorder()

    def step() -> None:
        recorder.start()
        model.train_step(batch, wrapper)

    with recorder.watching(model, modules):
        report = measure_memory(step, split=False, watch=recorder.record)
    return thinned(recorder.moments, report.peak), modules


def thinned(moments: list[tuple], peak: int) -> list[tuple]:
    """Drops moments that look like the one before; never one with the peak."""
    kept: list[tuple] = []
    for moment in moments:
        last = kept[-1] if kept else None
        if (
            last is None
            or moment[2:] != last[2:]
            or abs(moment[1] - last[1]) > _DETAIL * peak
            or moment[1] == peak != last[1]
        ):
            kept.append(moment)
    return [*kept, moments[-1]]


def record_steps(
    config: str,
    size: Sequence[int],
    batch: int,
    num_modules: int | None = None,
    options: Sequence[str] = (),
    schemes: Sequence[str] = SCHEMES,
) -> dict:
    """Records a step of each of several schemes.

    Args:
        config: Path of a config that is trained by local learning.
        size: Height and width of the images in pixels.
        batch: Images in the step.
        num_modules: Modules of equal memory. Defaults to the cuts of the config.
        options: Settings that override the config, each ``KEY=VALUE``.
        schemes: Some of ``'end-to-end'``, ``'exact'``, ``'joint'`` and ``'local'``.
            Defaults to end-to-end training and local learning.

    Returns:
        The moments of all, as ``steps``, the cuts, and what was asked for.
    """
    cfg = load_config(config, options)
    shape = (batch, 3, *size)
    ending = f'+K={num_modules}' if num_modules else ''
    local, modules = record_step(cfg, LOCAL + ending, shape)
    steps = dict.fromkeys(schemes, local)
    for scheme in steps.keys() - {LOCAL}:
        name = scheme if scheme == END_TO_END else scheme + ending
        steps[scheme], _ = record_step(cfg, name, shape, modules)
    command = ['mim', 'run', 'man_mm', 'draw_step', config]
    command += ['--size', *map(str, size), '--batch', str(batch)]
    command += ['--num-modules', str(num_modules)] if num_modules else []
    command += ['--schemes', *schemes] if tuple(schemes) != SCHEMES else []
    command += ['--cfg-options', *options] if options else []
    return dict(
        config=config,
        size=list(size),
        batch=batch,
        cuts=[module.cut for module in modules[:-1]],
        versions=versions(),
        command=shlex.join(command),
        steps=steps,
    )
