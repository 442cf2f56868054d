"""One training of `compare`: its command, its progress and its result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from man_mm.engine.config_files import find_config, load_config, shipped_folder
from man_mm.engine.quiet import quiet
from man_mm.measure.memory import measure_memory

from .records import provenance, versions
from .training_steps import build_model, build_wrapper, cut_names

_NO_METRICS = {'data_time', 'time', 'step', 'epoch', 'iter', 'memory'}
_POINTS = 100  # of a stored curve
_LONG = 10**6  # iterations, so that no share of them is done
_TAIL = 30  # lines of a log that failed
_MEASURING = threading.Lock()  # tracing a model patches torch for all threads


class RunError(RuntimeError):
    """A training that failed; the message ends with its log."""


@dataclass(frozen=True)
class ComparedConfig:
    """What is compared: a config, with settings that override it.

    Attributes:
        name: How it is called in tables and files.
        config: Path of the config.
        options: Settings, each ``KEY=VALUE``.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()

    @cached_property
    def cfg(self) -> Config:
        """The config with the options, and its imports done."""
        return load_config(self.config, self.options)


@dataclass(frozen=True)
class Run:
    """An entry with a seed.

    Attributes:
        entry: What is trained.
        seed: Of weights and data order.
        out: Folder of the result file.
        work_dirs: Folder of logs and checkpoints of all runs.
        position: Of the entry in tables.
    """

    entry: ComparedConfig
    seed: int
    out: Path
    work_dirs: Path
    position: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any setting of the config, and with the data set."""
        text = f'{self.entry.cfg.pretty_text} seed {self.seed} {self.data}'
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def data(self) -> str | None:
        """Hash of the manifest that our tools write beside a data set, if any."""
        root = self.entry.cfg.train_dataloader.dataset.get('data_root') or ''
        manifest = Path(root) / 'dataset.json'
        if not manifest.is_file():
            return None
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return f'{slug(self.entry.name)}_seed{self.seed}'

    @property
    def path(self) -> Path:
        """The result file."""
        return self.out / f'{self.name}.json'

    @property
    def work_dir(self) -> Path:
        # Never that of other settings, whose checkpoint would be resumed.
        return self.work_dirs / f'{self.name}_{self.fingerprint}'

    @property
    def is_done(self) -> bool:
        """Whether there is a result of just these settings."""
        if not self.path.exists():
            return False
        return json.loads(self.path.read_text())['fingerprint'] == self.fingerprint

    @property
    def length(self) -> int:
        """Iterations, or epochs if the config counts these."""
        loop = self.entry.cfg.train_cfg
        return loop.get('max_iters') or loop.max_epochs


def parse_entry(text: str, options: tuple[str, ...] = ()) -> ComparedConfig:
    """Reads ``'NAME=CONFIG KEY=VALUE KEY=VALUE'``.

    Args:
        text: What to read.
        options: Settings for all entries; its own come after them.

    Raises:
        ValueError: If it is written otherwise, or there is no such config.
    """
    name, equals, rest = text.partition('=')
    config, *own = shlex.split(rest) or ['']
    if not (name and equals and config) or any('=' not in option for option in own):
        raise ValueError(
            f'{text!r} is not an entry: write NAME=CONFIG or '
            '"NAME=CONFIG KEY=VALUE ...".'
        )
    try:
        find_config(config)
    except FileNotFoundError as error:
        raise ValueError(f'Entry {name!r}: {error}') from error
    return ComparedConfig(name, config, (*options, *own))


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')


def train(run: Run, threads: int, progress: Callable[[int], None]) -> dict:
    """Trains, or goes on where it was stopped, and writes the result file.

    Args:
        run: The run.
        threads: CPU threads.
        progress: Called with the iterations, or epochs, that are done.

    Returns:
        The result.

    Raises:
        RunError: If the training fails.
    """
    run.work_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, shipped_folder() / 'tools/train.py']
    command += [
        find_config(run.entry.config),
        '--work-dir',
        run.work_dir,
        '--resume',
        '--cfg-options',
    ]
    command += [*run.entry.options, f'randomness.seed={run.seed}']
    log = run.work_dir / 'train.log'
    with log.open('w') as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
        )
        with _killed_on_error(process):
            while process.poll() is None:
                time.sleep(1)
                progress(_done(run.work_dir))
    if process.returncode:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-_TAIL:])
        raise RunError(f'{tail}\n{run.name} failed, see {log}.')
    result = _result(run, threads)
    run.out.mkdir(parents=True, exist_ok=True)
    part = run.path.with_suffix('.part')
    part.write_text(json.dumps(result, indent=2) + '\n')
    part.replace(run.path)
    return result


@contextmanager
def _killed_on_error(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _scalars(work_dir: Path) -> list[dict]:
    """Rows of all logs of a run, those of a part that was run twice only once."""
    rows: dict[tuple, dict] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # being written
                continue
            rows['lr' in row, row['step']] = row
    return sorted(rows.values(), key=lambda row: row['step'])


def _done(work_dir: Path) -> int:
    rows = _scalars(work_dir)
    return max((row.get('epoch', row['step']) for row in rows), default=0)


def _result(run: Run, threads: int) -> dict:
    rows = _scalars(run.work_dir)
    trained = [row for row in rows if 'lr' in row]
    metrics = [
        {key: value for key, value in row.items() if key not in _NO_METRICS}
        for row in rows
        if 'lr' not in row
    ]
    if not (trained and metrics):
        raise RunError(f'{run.name} logged no loss or no metric, see {run.work_dir}.')
    losses = [key for key in trained[-1] if key == 'loss' or key.endswith('/loss')]
    sparse = trained[:: -(-len(trained) // _POINTS)]
    entry, cfg, device = run.entry, run.entry.cfg, get_device()
    command = ['mim', 'run', 'man_mm', 'compare']
    command += [f'{entry.name}={shlex.join([entry.config, *entry.options])}']
    command += ['--seeds', str(run.seed), '--out', str(run.out)]
    return dict(
        name=entry.name,
        config=entry.config,
        options=list(entry.options),
        seed=run.seed,
        position=run.position,
        fingerprint=run.fingerprint,
        metrics=metrics[-1],
        length=run.length,
        step_seconds=statistics.median(row['time'] for row in trained),
        **_measure_step(cfg),
        curves=dict(
            step=[row['step'] for row in sparse],
            **{key: [round(row[key], 6) for row in sparse] for key in losses},
        ),
        threads=threads,
        data=run.data,
        versions=versions(),
        device=device,
        **provenance(device),
        command=shlex.join(command),
    )


def _measured(model, wrapper, batch: dict, learner):
    model.train_step(batch, wrapper)  # makes the optimizer's state
    return measure_memory(lambda: model.train_step(batch, wrapper), learner=learner)


def _measure_step(cfg: Config) -> dict:
    """What a training step on a batch of the data set is like, on the CPU.

    Its peak in bytes, its images, and the cuts of the model. The resolution is None if
    images differ in it.
    """
    loader = {**cfg.train_dataloader, 'num_workers': 0, 'persistent_workers': False}
    with _MEASURING, quiet():
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
        model = build_model(cfg.model)
        wrapper = build_wrapper(model, cfg)
        wrapper.initialize_count_status(model, 0, _LONG)
        learner = getattr(wrapper, 'learner', None)
        report = _measured(model, wrapper, batch, learner)
        if learner and wrapper.dial.share and len(learner.modules) > 1:
            wrapper.dial.turn()  # the training has steps of both kinds
            after = _measured(model, wrapper, batch, learner)
            report = max(report, after, key=lambda report: report.peak)
    sizes = {tuple(image.shape[-2:]) for image in batch['inputs']}
    return dict(
        peak_bytes=report.peak,
        kinds=report.kinds,
        batch=len(batch['inputs']),
        resolution=list(sizes.pop()) if len(sizes) == 1 else None,
        cuts=list(cut_names(learner)) if learner else [],
    )
