"""Makes entries of the leaderboard from result files."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from mmengine.config import Config

from man_mm.engine.config_files import load_config

from .entries import (
    DEMO_CONFIG,
    FIELDS,
    RESULTS,
    TASKS,
    EntryError,
    count_heads,
    derive,
    overrides,
    raw_kind,
    read_raw,
)

_DATA = {'photos': 'photographs', 'fashion': 'Fashion-MNIST', 'digits': 'digits'}
# Options of end-to-end training that recompute, and steps that are end to end.
_RECOMPUTING = {'checkpointing', 'stages', 'cuts', 'K', 'recompute'}
_STEPS = {'exact': 'exact steps', 'joint': '{}, joint'}
_MODELS = {
    'FasterRCNN': 'Faster R-CNN',
    'EDSRNet': 'EDSR',
    'MSRResNet': 'SRResNet',
    'RRDBNet': 'RRDB',
    'RDNNet': 'RDN',
    'SwinIRNet': 'SwinIR',
    'CIFARResNet': 'ResNet',
}


def make_entries(
    paths: Iterable[Path],
    known: dict[Path, dict],
    root: Path,
    words: dict | None = None,
    with_times: bool = True,
) -> dict[Path, dict]:
    """Makes the entries of result files.

    Numbers come from the files, and from those that are in the same entry already:
    other seeds, or the demo's accuracy. What they do not say is taken from ``words``,
    else from the entry that is there already, else from the config.

    Args:
        paths: Result files, or folders of them.
        known: Entries that are there already, by their path.
        root: The repository.
        words: Fields that the files do not say.
        with_times: Whether times of steps are used.

    Returns:
        Entries by their path.

    Raises:
        EntryError: If files are missing, or cannot be on the board.
    """
    files = _result_files(paths, root)
    old = {entry['id']: entry for entry in known.values()}
    names = {entry_name(path, root) for path in files}
    partners = sources_of([old[name] for name in names & set(old)], root)
    files = sorted({*files, *filter(Path.is_file, partners)})
    records = {path: read_raw(path) for path in files}
    groups = _group(records, root)
    made = {}
    for name, sources in groups.items():
        before = old.get(name, {})
        derived = derive([records[path] for path in sources])
        refused = [
            k for k, v in (words or {}).items() if derived.get(k) not in (None, v)
        ]
        if refused:
            raise EntryError(f'{sources[0]} says itself what {refused[0]} is.')
        # Times that were not used stay unused.
        if not with_times or before.get('step_seconds', True) is None:
            derived['step_seconds'] = None
        entry = dict.fromkeys(FIELDS) | _words(records[sources[0]], root)
        entry |= _commit(sources[0], root) if derived['commit'] is None else {}
        for fields in (before, words or {}, derived):
            entry = _merge(entry, fields)
        entry |= {key: derived[key] for key in ('step_seconds', 'metrics')}
        entry |= dict(
            id=name,
            kind='measured',
            baseline=_baseline(name, sources[0], records[sources[0]], root),
            sources=[path.relative_to(root / RESULTS).as_posix() for path in sources],
        )
        made[root / RESULTS / entry['task'] / f'{name}.json'] = entry
    return made


def _merge(old: dict, new: dict) -> dict:
    """Merges new fields into old ones; None means unknown, also within objects."""
    merged = dict(old)
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            merged[key] = _merge(old[key], value)
        elif value is not None:
            merged[key] = value
    return merged


def write_entry(path: Path, entry: dict) -> None:
    """Writes an entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entry, indent=2, ensure_ascii=False)
    # Lists of numbers and short lists on one line.
    text = re.sub(r'\[\s+([^\[\]{}]{0,80}?)\s+\]', _one_line, text)
    path.write_text(text + '\n', 'utf-8')


def _one_line(match: re.Match) -> str:
    return '[' + re.sub(r',\s+', ', ', match[1]) + ']'


def _result_files(paths: Iterable[Path], root: Path) -> list[Path]:
    files = []
    results = (root / RESULTS).resolve()
    for path in paths:
        if not path.exists():
            raise EntryError(f'{path} does not exist.')
        if not path.resolve().is_relative_to(results):
            raise EntryError(
                f'{path} is not in {RESULTS}: put it there, to be published.'
            )
        inside = path.resolve().relative_to(results)
        found = sorted((root / RESULTS / inside).rglob('*.json'))
        files += [root / RESULTS / inside] if path.is_file() else found
        if path.is_dir() and not found:
            raise EntryError(f'{path} has no result files.')
    return list(dict.fromkeys(files))


def _group(records: dict[Path, dict], root: Path) -> dict[str, list[Path]]:
    """Files of each entry, by its name; results of the demo join the two schemes."""
    groups: dict[str, list[Path]] = {}
    demos = [path for path, record in records.items() if raw_kind(record) == 'demo']
    for path, record in records.items():
        if path not in demos:
            groups.setdefault(entry_name(path, root), []).append(path)
        if _is_of_demo(record) and record['scheme'] in ('end-to-end', 'local'):
            groups[entry_name(path, root)] += demos
    if demos and not any(set(demos) <= set(group) for group in groups.values()):
        raise EntryError(
            f'{demos[0]} has accuracy only: add it together with the folder that '
            f'the tool benchmark wrote for {DEMO_CONFIG}.'
        )
    return groups


def _is_of_demo(record: dict) -> bool:
    return raw_kind(record) == 'step' and record['config'] == DEMO_CONFIG


def entry_name(path: Path, root: Path) -> str:
    """The entry of a result file: its path without a seed, in one word."""
    name = path.relative_to(root / RESULTS).with_suffix('').as_posix()
    name = re.sub(r'_seed\d+$', '', name).removeprefix('training/')
    return name.replace('/', '-')


def _baseline(name: str, path: Path, record: dict, root: Path) -> str | None:
    """The entry of end-to-end training that was measured beside a result."""
    kind = raw_kind(record)
    beside = {
        p: r for p in path.parent.glob('*.json') if raw_kind(r := read_raw(p)) == kind
    }
    if kind == 'run':
        plain = 'end-to-end'
        found = [p for p, run in beside.items() if not count_heads(run)]
        found.sort(key=lambda p: (beside[p]['position'], p))
    else:
        precisions = [x for x in ('bf16', 'fp16') if x in record['scheme'].split('+')]
        plain = '+'.join(['end-to-end', *precisions])
        keys = ('config', 'size', 'batch', 'device')
        found = [
            p
            for p, step in beside.items()
            if step['scheme'] == plain and all(step[k] == record[k] for k in keys)
        ]
    if not found:
        raise EntryError(
            f'{path}: {plain!r} was not measured beside it: there is no baseline.'
        )
    base = entry_name(found[0], root)
    return None if base == name else base


def _words(record: dict, root: Path) -> dict:
    """What the config says of a result, for fields that the result does not have."""
    cfg = _load_config(root, record['config'], tuple(overrides(record)))
    is_run = raw_kind(record) == 'run'
    wrapper = cfg.optim_wrapper
    amp = (
        str(wrapper.get('dtype', 'float16')) if 'Amp' in wrapper.get('type', '') else ''
    )
    data = Path(cfg.train_dataloader.dataset.get('data_root') or '').name
    # A number behind the name is that of pixels, which the resolution says.
    data = _DATA.get(data.rstrip('0123456789'), data)
    task, model = describe_model(cfg)
    return dict(
        task=task,
        model=model,
        dataset=data if is_run else 'synthetic',
        method=_method(record, cfg),
        batch=cfg.train_dataloader.batch_size,
        precision={'': 'fp32', 'bfloat16': 'bf16'}.get(amp, 'fp16'),
        optimizer=_optimizer(cfg),
        device='cpu' if is_run else None,
    )


@cache
def _load_config(root: Path, path: str, options: tuple[str, ...]) -> Config:
    if not (root / path).is_file():
        raise EntryError(f'the config {path} does not exist here: add it as well.')
    return load_config(root / path, options)


def describe_model(cfg: Config) -> tuple[str, str]:
    """The task of a config's model, and how the model is called on the board."""
    if 'generator' in cfg.model:
        net = cfg.model.generator
        scale = net.get('upscale_factor') or net.get('upscale')
        name = f'{_MODELS.get(net.type, net.type)} ×{scale}'
        if 'num_blocks' in net:
            name += f', {net.num_blocks} blocks of {net.mid_channels}'
        return 'super-resolution', name
    backbone = cfg.model.backbone
    kind = backbone.get('depth') or backbone.get('arch')
    name = f'{_MODELS.get(backbone.type, backbone.type)}-{kind}'
    if cfg.model.type == 'ImageClassifier':
        return 'classification', name
    return 'detection', f'{_MODELS.get(cfg.model.type, cfg.model.type)}, {name}'


def _method(record: dict, cfg: Config) -> str:
    """The method: of runs their name without K, else by scheme and auxiliary heads."""
    head = cfg.optim_wrapper.get('local_learning', {}).get('aux_head', {})
    method = head.get('type', 'MANHead').rpartition('.')[2].removesuffix('Head')
    if raw_kind(record) == 'run':
        if not count_heads(record):
            with_cp = cfg.model.get('backbone', {}).get('with_cp')
            return 'checkpointing' if with_cp else 'end-to-end'
        name = re.sub(r',?\s*\bK\s*=?\s*\d+', '', record['name']).strip(', ')
        return method if name.lower() == method.lower() else name
    base, *options = record['scheme'].split('+')
    if base == 'end-to-end':
        names = {option.partition('=')[0] for option in options}
        return 'checkpointing' if names & _RECOMPUTING else 'end-to-end'
    return _STEPS.get(base, method).format(method)


def _optimizer(cfg: Config) -> str:
    settings = dict(cfg.optim_wrapper.optimizer)
    name = settings.pop('type')
    settings.pop('_scope_', None)
    return f'{name}({", ".join(f"{k}={v}" for k, v in settings.items())})'


def _commit(path: Path, root: Path) -> dict:
    """Of a result that does not say: the commit that brought it, and its date."""
    git = [
        'git',
        '-C',
        str(root),
        'log',
        '-1',
        '--format=%h %cs',
        '--',
        str(path.resolve()),
    ]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    commit, _, date = found.stdout.strip().partition(' ')
    return dict(commit=commit, date=date) if commit else {}


def read_given(path: Path, root: Path) -> tuple[Path, dict] | None:
    """Reads a finished entry, such as a reported one, and says where it belongs.

    Returns:
        Its path in the repository and the entry; None if the file is not an entry.
    """
    if path.suffix != '.json' or not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text('utf-8'))
    except json.JSONDecodeError as error:
        raise EntryError(f'{path} is not valid JSON: {error}.') from error
    if not isinstance(entry, dict) or 'kind' not in entry:
        return None
    task = entry.get('task')
    if task not in TASKS:
        raise EntryError(f'{path}: task: {task!r} is not one of {", ".join(TASKS)}.')
    return root / RESULTS / task / f'{entry.get("id") or path.stem}.json', entry


def sources_of(entries: Sequence[dict], root: Path) -> list[Path]:
    """The result files of all measured entries."""
    names = [name for entry in entries for name in entry.get('sources', ())]
    return [root / RESULTS / name for name in dict.fromkeys(names)]
