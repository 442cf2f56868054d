"""What training schemes cost side by side: bytes, operations, time, exactness."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from man_mm.backbones import find_backbone, find_units, image_channels
from man_mm.core import Unit
from man_mm.engine.config_files import load_config
from man_mm.engine.quiet import quiet
from man_mm.measure.flops import count_flops
from man_mm.measure.memory import measure_memory
from man_mm.measure.synthetic_batch import synthetic_batch

from .records import MIB, make_records, write_records
from .schemes import (
    ALL,
    SchemeError,
    default_schemes,
    parse_scheme,
    scheme_config,
)
from .training_steps import Built, build_scheme

_BUSY = 0.1
_PLAIN = dict(highlight=False, markup=False)


def measure_schemes(
    cfg: Config,
    size: tuple[int, int],
    batch: int,
    repeats: int,
    schemes: Sequence[str] | None = None,
    device: str = 'cpu',
    console: Console | None = None,
) -> dict[str, dict]:
    """Measures schemes of a config in turn.

    Args:
        cfg: Config of a model, with or without local learning.
        size: Height and width of the images in pixels.
        batch: Images in a step.
        repeats: Timed steps a scheme; 0 for none, where the machine is busy.
        schemes: The schemes. Defaults to those of `default_schemes` that the config
            allows.
        device: Where to train.
        console: Where progress is shown.

    Returns:
        By scheme: ``cuts``, ``peak``, ``kinds`` and ``modules`` in bytes, ``flops``,
        ``exactness`` and its ``reference``, and ``seconds``, a list.

    Raises:
        SchemeError: If a scheme is not possible.
    """
    console = console or Console()
    gc.collect()  # the models of the call before
    with quiet():
        model = MODELS.build(cfg.model)
        shape = (batch, image_channels(find_backbone(model)[1]), *size)
        data, units = synthetic_batch(model, shape), find_units(model)
    del model
    names = schemes or default_schemes(units, batch)
    built, results = {}, {}
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(names, description='building'):
            scheme = parse_scheme(name)
            try:
                with _naming(name):
                    built[name] = build_scheme(cfg, scheme, data, shape, device)
            except SchemeError as error:
                if schemes or name in ALL:
                    raise
                console.print(f'left out: {error}', **_PLAIN)
        first = next(iter(built.values())).model.state_dict()
        initial = {key: value.clone() for key, value in first.items()}
        references = References(next(iter(built.values())))
        for name in progress.track(list(built), description='memory and FLOPs'):
            try:
                results[name] = _measure_one(
                    name, built[name], units, references, initial, device
                )
            except RuntimeError as error:
                if schemes or 'BFloat16' not in str(error):
                    raise
                del built[name]
                console.print(f'left out: Scheme {name!r}: {error}', **_PLAIN)
                continue
            peak = results[name]['peak'] / MIB
            console.print(f'{name}: {peak:.0f} MiB', **_PLAIN)
        task = progress.add_task('time', total=repeats * len(built))
        for _, (name, scheme) in itertools.product(range(repeats), built.items()):
            # Proposals, and thus their number, depend on the weights.
            scheme.model.load_state_dict(initial)
            results[name]['seconds'].append(_seconds(scheme.step, device))
            progress.advance(task)
    return results


def drop_busy_times(results: dict[str, dict], console: Console) -> None:
    """Drops all times if those of the first scheme say that the machine was busy.

    Its steps are alike, so that their times are, too, unless something else ran.
    Fewer than three times tell nothing.

    Args:
        results: Those of `measure_schemes`; changed in place.
        console: Where it is said.
    """
    name, first = next(iter(results.items()))
    seconds = first['seconds']
    if len(seconds) < 3:
        return
    low, middle, high = statistics.quantiles(seconds, n=4, method='inclusive')
    spread = (high - low) / middle
    if spread > _BUSY:
        for result in results.values():
            result['seconds'] = []
        console.print(
            f'No times: the middle half of those of {name} differs by {spread:.0%}, so '
            f'something else ran on this machine (limit: {_BUSY:.0%}). Bytes and FLOPs '
            'are not affected.',
            **_PLAIN,
        )


@contextmanager
def _naming(scheme: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SchemeError(f'Scheme {scheme!r}: {error}') from error


def stage_groups(units: Iterable[Unit], model: torch.nn.Module) -> dict[str, list]:
    """A model's submodules by stage, and what is around them."""
    groups: dict[str, list] = {}
    for unit in units:
        name = 'stem' if unit.stage < 0 else f'stage {unit.stage + 1}'
        parts = [model.get_submodule(part) for part in unit.parts]
        groups.setdefault(name, []).extend(parts)
    place, backbone = find_backbone(model)
    around = 'upsampler' if place == 'generator' else 'neck and heads'
    return {**groups, 'backbone': [backbone], around: [model]}


class References:
    """The weights after the first step of the first scheme of each method."""

    def __init__(self, first: Built) -> None:
        self._initial = _weights(first)
        self._trained: dict[tuple, tuple[str, list[Tensor]]] = {}

    def compare(self, name: str, scheme: Built) -> tuple[float, str]:
        """How far a scheme's weights are off, and the name of its reference."""
        weights = _weights(scheme)
        reference, trained = self._trained.setdefault(scheme.method, (name, weights))
        error = _distance(weights, trained)
        return error and error / _distance(trained, self._initial), reference


def _weights(scheme: Built) -> list[Tensor]:
    return [p.detach().to('cpu', copy=True) for p in scheme.model.parameters()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    squares = ((x - y).double().square().sum() for x, y in zip(a, b, strict=True))
    return float(sum(squares).sqrt())


def _measure_one(
    name: str,
    scheme: Built,
    units: Sequence[Unit],
    references: References,
    initial: dict[str, Tensor],
    device: str,
) -> dict:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    flops = count_flops(scheme.step)  # makes the optimizer's state, too
    exactness, reference = references.compare(name, scheme)
    scheme.model.load_state_dict(initial)
    if device.startswith('cuda'):
        gc.collect()
        torch.cuda.empty_cache()
    report = measure_memory(
        scheme.step,
        device=device,
        groups=stage_groups(units, scheme.model),
        learner=scheme.learner,
    )
    cuda = ('allocated', 'reserved', 'requested')
    return dict(
        cuts=list(scheme.cuts),
        peak=report.peak,
        kinds=report.kinds,
        modules=report.modules,
        flops=flops,
        exactness=exactness,
        reference=reference,
        seconds=[],
        cuda={key: getattr(report, key) for key in cuda if device.startswith('cuda')},
    )


def _seconds(step: Callable[[], None], device: str) -> float:
    synchronize = torch.cuda.synchronize if device.startswith('cuda') else int
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def measure_configs(
    configs: Sequence[str],
    size: tuple[int, int],
    batches: Sequence[int],
    repeats: int,
    schemes: Sequence[str] | None = None,
    device: str = 'cpu',
    options: Sequence[str] = (),
    out: Path | None = None,
    console: Console | None = None,
) -> list[dict]:
    """Measures schemes of every config with every batch.

    Args:
        configs: Paths of configs.
        size: Height and width of the images in pixels.
        batches: Images in a step.
        repeats: Timed steps a scheme; 0 for none.
        schemes: As in `measure_schemes`.
        device: Where to train.
        options: Settings that override the configs, each ``KEY=VALUE``.
        out: Folder for JSON files, written as soon as a config is measured; without
            times where `drop_busy_times` drops them.
        console: Where progress is shown.

    Returns:
        The records of `make_records`.

    Raises:
        SchemeError: If a scheme is not possible; of all configs before the first is
            measured.
    """
    console = console or Console()
    # Hours of measuring must not end in an error that could have been told before.
    for config, batch in itertools.product(configs, batches):
        cfg = load_config(config, options)
        for name in schemes or ():
            scheme = parse_scheme(name)
            with _naming(name):
                scheme_config(cfg, scheme, (batch, 3, *size), device)
    everything = []
    for config, batch in itertools.product(configs, batches):
        console.rule(f'{Path(config).stem}, {batch} x {size[0]}x{size[1]}')
        cfg = load_config(config, options)
        results = measure_schemes(cfg, size, batch, repeats, schemes, device, console)
        drop_busy_times(results, console)
        records = make_records(results, config, size, batch, device, options)
        everything += records
        if out:
            write_records(records, out)
    return everything
