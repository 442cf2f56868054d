"""Measure training schemes side by side: ``mim run man_mm benchmark CONFIG``.

Every scheme trains the same model from the same weights on the same images, in one
process. For each of them:

- memory: the peak of live tensor bytes above the start of a training step whose
  optimizer state exists already, and what it consists of;
- time: the median of steps that are taken in turn with those of the other schemes;
- floating-point operations of a step;
- exactness: how far the model's weights after the first step are from those of the
  reference, as a share of the length of the reference's first update. 0 is bit for
  bit, 1e-7 to 1e-4 is rounding (Adam magnifies it: it divides small gradients by
  themselves), and more is another method. The reference is the first scheme with the
  same cuts and auxiliary heads, or for schemes without cuts the first of those.

Ratios are those to end-to-end training, or to the first scheme.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from man_mm.backbones import find_backbone, find_units, image_channels
from man_mm.core import Unit
from man_mm.measure.flops import count_flops
from man_mm.measure.memory import measure_memory
from man_mm.measure.synthetic_batch import synthetic_batch

from .records import (
    MIB,
    make_records,
    make_tables,
    markdown_rows,
    read_records,
    write_records,
)
from .scheme_pictures import draw_pictures
from .schemes import (
    ALL,
    SchemeError,
    default_schemes,
    describe_options,
    parse_scheme,
    scheme_config,
)
from .training_steps import Built, build_scheme, cut_names, quiet

_PLAIN = dict(highlight=False, markup=False)


def load_config(path: str, options: Sequence[str] = ()) -> Config:
    """Loads a config, its custom imports and its default scope.

    Args:
        path: Path of the config.
        options: Settings to override, each ``KEY=VALUE``.
    """
    cfg = Config.fromfile(path)
    if options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--options', nargs='+', action=DictAction)
        cfg.merge_from_dict(parser.parse_args(['--options', *options]).options)
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=None)))
    with quiet():
        init_default_scope(cfg.get('default_scope', 'mmdet'))
    return cfg


def measure(
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
        repeats: Timed steps a scheme.
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
        references = References(next(iter(built.values())))
        for name in progress.track(list(built), description='memory and FLOPs'):
            try:
                results[name] = _measure_one(name, built[name], references, device)
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
            results[name]['seconds'].append(_seconds(scheme.step, device))
            progress.advance(task)
    return results


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


def _measure_one(name: str, scheme: Built, references: References, device: str) -> dict:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    flops = count_flops(scheme.step)  # makes the optimizer's state, too
    exactness, reference = references.compare(name, scheme)
    if device.startswith('cuda'):
        gc.collect()
        torch.cuda.empty_cache()
    report = measure_memory(
        scheme.step,
        device=device,
        groups=stage_groups(find_units(scheme.model), scheme.model),
        learner=scheme.learner,
    )
    cuda = ('allocated', 'reserved', 'requested')
    return dict(
        cuts=cut_names(scheme.learner),
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


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f'options of schemes:\n{describe_options()}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='*', metavar='CONFIG')
    parser.add_argument('--schemes', nargs='+', help='such as local+K=4+micro=1')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(800, 1333), help='height and width'
    )
    parser.add_argument(
        '--batch', type=int, nargs='+', default=[1], help='images in a step'
    )
    parser.add_argument('--repeats', type=int, default=5, help='timed steps')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='overrides'
    )
    parser.add_argument('--out', type=Path, help='folder for JSON files')
    parser.add_argument('--picture', type=Path, help='PNG file for the comparison')
    parser.add_argument(
        '--from', dest='source', type=Path, help='show JSON files, measure nothing'
    )
    parser.add_argument(
        '--markdown', action='store_true', help='print rows for documents'
    )
    args = parser.parse_args()
    if not (args.configs or args.source):
        parser.error('give a CONFIG, or --from DIR')
    if args.repeats < 1:
        parser.error('--repeats must be at least 1')
    for message in ('.*use_reentrant', 'pkg_resources'):
        warnings.filterwarnings('ignore', message=message)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        records = measure_all(args, console)
    except SchemeError as error:
        parser.error(str(error))
    if args.markdown:
        print('\n'.join(markdown_rows(records)))
    else:
        for table in make_tables(records):
            console.print(table)
    if args.picture:
        for path in draw_pictures(records, args.picture):
            console.print(path)


def measure_all(args: argparse.Namespace, console: Console) -> list[dict]:
    """Measures every config with every batch, or reads what was measured."""
    if args.source:
        return read_records(args.source, args.configs)
    # Hours of measuring must not end in an error that could have been told before.
    for config, batch in itertools.product(args.configs, args.batch):
        cfg = load_config(config, args.cfg_options)
        for name in args.schemes or ():
            scheme = parse_scheme(name)
            with _naming(name):
                scheme_config(cfg, scheme, (batch, 3, *args.size), args.device)
    everything = []
    for config, batch in itertools.product(args.configs, args.batch):
        console.rule(f'{Path(config).stem}, {batch} x {args.size[0]}x{args.size[1]}')
        cfg = load_config(config, args.cfg_options)
        results = measure(
            cfg, args.size, batch, args.repeats, args.schemes, args.device, console
        )
        records = make_records(
            results, config, args.size, batch, args.device, args.cfg_options
        )
        everything += records
        if args.out:
            write_records(records, args.out)
    return everything
