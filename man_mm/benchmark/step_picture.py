"""Draw the memory of one training step over time: ``mim run man_mm draw_step``.

Trains a config's model for one step end to end and one by local learning, records the
bytes of all live tensors after each operation, and draws both, one above the other:
which module is running, its forward pass, its loss, its backward pass and update.
Bytes are counted above the start of the step, as by `benchmark`, and repeat
exactly. Time is the share of the step that has passed, on the machine that measured it,
while bytes are counted; steps are compared in time by `benchmark`.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import matplotlib

from man_mm.core import LocalModule
from man_mm.measure.memory import measure_memory
from man_mm.measure.synthetic_batch import synthetic_batch

from .records import MIB, versions
from .scheme_costs import load_config
from .schemes import parse_scheme, scheme_config
from .training_steps import build_model, build_wrapper, quiet

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

CONFIG = 'configs/man/resnet50_man_imagenet.py'
SCHEMES = ('end-to-end', 'local')
TITLES = {
    'end-to-end': (
        'End-to-end',
        'Activations of all modules wait for the one backward pass at the end.',
    ),
    'local': (
        'Local learning',
        'Each module is back-propagated by its own loss before the next one starts.',
    ),
}
HATCH = '////'
COLOURS = ('#1b6ca8', '#2a9d8f', '#e9a23b', '#c8553d', '#7b4b94', '#5a7d2b')
LOSS_COLOUR = '0.25'
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
        output.register_hook(lambda _: self._back(index))

    def _back(self, index: int) -> None:
        self._running = (index, 'backward')


def record_step(cfg, scheme: str, shape: tuple[int, ...], modules=None) -> tuple:
    """Trains the second step of a config's model by a scheme, and records it.

    Args:
        cfg: Config of a model trained by local learning.
        scheme: As of `benchmark`.
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


def draw(records: dict, path: Path) -> None:
    """Draws the recorded steps, one above the other, on the same axes."""
    figure, panels = plt.subplots(
        len(SCHEMES),
        1,
        figsize=(8, 6.4),
        sharex=True,
        sharey=True,
        layout='constrained',
    )
    steps = records['steps']
    top = max(m[1] for moments in steps.values() for m in moments) / MIB
    for panel, (scheme, moments) in zip(panels, steps.items(), strict=True):
        _draw_step(panel, moments)
        peak = max(moments, key=lambda moment: moment[1])
        panel.axhline(peak[1] / MIB, color='0.35', lw=0.9, ls=':')
        title, text = TITLES[scheme]
        panel.set_title(
            f'{title}: peak {peak[1] / MIB:.0f} MiB\n',
            loc='left',
            fontsize=12,
            weight='bold',
        )
        panel.text(0, 1.03, text, transform=panel.transAxes, fontsize=9.5)
        panel.set(ylabel='MiB alive', ylim=(0, 1.06 * top))
        panel.spines[['top', 'right']].set_visible(False)
    panels[-1].set(xlabel='time, share of the training step in %', xlim=(0, 100))
    count = 1 + max(m[2] for moments in steps.values() for m in moments)
    handles = [
        Patch(facecolor=COLOURS[index], label=f'module {index + 1}')
        for index in range(count)
    ]
    handles += [
        Patch(facecolor='0.6', label='forward'),
        Patch(facecolor=LOSS_COLOUR, label='head and loss'),
        Patch(facecolor='0.85', edgecolor='0.4', hatch=HATCH, label='backward, update'),
    ]
    figure.legend(
        handles=handles,
        ncols=len(handles),
        loc='outside lower center',
        fontsize=9,
        frameon=False,
        columnspacing=1.1,
        handlelength=1.4,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_step(panel: Axes, moments: list) -> None:
    end = moments[-1][0]
    start = 0
    for stop in range(1, len(moments)):
        if stop < len(moments) - 1 and moments[stop][2:] == moments[start][2:]:
            continue
        part = moments[start : stop + 1]
        _, _, index, phase = moments[start]
        colour = LOSS_COLOUR if phase == 'loss' else COLOURS[index]
        panel.fill_between(
            [100 * m[0] / end for m in part],
            [m[1] / MIB for m in part],
            step='post',
            facecolor=colour,
            alpha=0.45 if phase == 'backward' else 1.0,
            hatch=HATCH if phase == 'backward' else None,
            edgecolor='white' if phase == 'backward' else colour,
            lw=0,
        )
        start = stop


def measure(args: argparse.Namespace) -> dict:
    """Records both steps."""
    cfg = load_config(args.config, args.cfg_options)
    shape = (args.batch, 3, *args.size)
    scheme = f'local+K={args.num_modules}' if args.num_modules else 'local'
    local, modules = record_step(cfg, scheme, shape)
    plain, _ = record_step(cfg, 'end-to-end', shape, modules)
    return dict(
        config=args.config,
        size=list(args.size),
        batch=args.batch,
        cuts=[module.cut for module in modules[:-1]],
        versions=versions(),
        command=f'mim run man_mm draw_step {shlex.join(sys.argv[1:])}',
        steps={'end-to-end': plain, 'local': local},
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', default=CONFIG)
    parser.add_argument(
        '--size', type=int, nargs=2, default=(224, 224), help='height and width'
    )
    parser.add_argument('--batch', type=int, default=8, help='images in the step')
    parser.add_argument(
        '--num-modules',
        type=int,
        metavar='K',
        help='modules of equal memory; default: the cuts of the config',
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--out', type=Path, help='JSON file for what was measured')
    parser.add_argument(
        '--from', dest='source', type=Path, help='draw a JSON file, measure nothing'
    )
    parser.add_argument('--picture', type=Path, required=True, help='PNG file')
    args = parser.parse_args()
    records = json.loads(args.source.read_text()) if args.source else measure(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(records) + '\n')
    draw(records, args.picture)
    print(args.picture)
