"""Linear probes: how well each stage of a trained network tells classes apart."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.ops import roi_align

from man_mm.backbones import find_backbone, find_units, probe
from man_mm.engine.config_files import load_config
from man_mm.engine.quiet import quiet

from .comparison import read_results
from .records import provenance, versions
from .training_runs import slug

_STEPS = 1000  # at most, of fitting a probe


def whole_model(cfg: Config) -> dict:
    """Config of the model as a runner builds it, with what mmpretrain keeps beside."""
    beside = cfg.get('data_preprocessor')
    return {**({'data_preprocessor': beside} if beside else {}), **cfg.model}


def read_features(
    cfg: Config, model: nn.Module, count: int | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Runs the backbone on the validation images.

    Args:
        cfg: Config with a ``val_dataloader``.
        model: A classifier of mmpretrain or a detector of mmdet, trained.
        count: Images, from the first. Defaults to all.

    Returns:
        For the last unit of each stage, features ``(M, C)`` of M objects or images;
        their labels ``(M,)``; and the number ``(M,)`` of the image that each is of.
    """
    units = find_units(model)
    ends = {unit.stage: unit for unit in units if unit.stage >= 0}
    strides = {tap.name: tap.stride for tap in probe(model, units)[1]}
    maps: dict[str, Tensor] = {}
    handles = []
    for unit in ends.values():

        def keep(_m, args, output, unit=unit):
            maps[unit.name] = unit.map_of(output, args)

        handles.append(model.get_submodule(unit.name).register_forward_hook(keep))
    loader = {**cfg.val_dataloader, 'num_workers': 0, 'persistent_workers': False}
    batches = Runner.build_dataloader(loader)
    features: dict[str, list[Tensor]] = {unit.name: [] for unit in ends.values()}
    labels, images, seen = [], [], 0
    for batch in track(batches, 'images', transient=True):
        with torch.no_grad():
            data = model.data_preprocessor(batch)
            find_backbone(model)[1](data['inputs'])
        boxes, found = objects_of(data['data_samples'])
        for name, map_ in maps.items():
            if boxes is None:
                vectors = map_.mean((2, 3))
            else:
                scale = 1 / strides[name]
                vectors = roi_align(map_, boxes, 1, scale, sampling_ratio=4).flatten(1)
            features[name].append(vectors)
        labels += found
        images += [x.new_full((len(x),), seen + i) for i, x in enumerate(found)]
        seen += len(found)
        if count is not None and seen >= count:
            break
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    return joined, torch.cat(labels), torch.cat(images)


def objects_of(samples: Sequence) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Boxes in pixels of the network's input, None without any; labels; by image."""
    if 'gt_label' in samples[0]:
        return None, [sample.gt_label for sample in samples]
    boxes, labels = [], []
    for sample in samples:
        objects = sample.gt_instances
        scale = objects.bboxes.new_tensor(sample.scale_factor).repeat(2)
        boxes.append(objects.bboxes * scale)  # read behind the pipeline's Resize
        labels.append(objects.labels)
    return boxes, labels


def fit_probes(
    features: dict[str, Tensor], labels: Tensor, images: Tensor
) -> dict[str, float]:
    """Accuracy in percent of a linear probe of each stage.

    Args:
        features: Features ``(M, C)`` of each stage.
        labels: Classes ``(M,)``.
        images: Numbers ``(M,)`` of the images; odd ones are for testing.

    Raises:
        ValueError: If one half has less than two classes.
    """
    # Slow to import, and needed here only.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tested = images % 2 == 1
    if min(len(labels[tested].unique()), len(labels[~tested].unique())) < 2:
        raise ValueError('there are too few images for a probe: give more.')
    accuracies = {}
    for name, values in features.items():
        classifier = make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=_STEPS)
        )
        classifier.fit(values[~tested], labels[~tested])
        accuracies[name] = 100 * classifier.score(values[tested], labels[tested])
    return accuracies


def make_table(results: Sequence[dict]) -> Table:
    """A row for each network, a column for each stage."""
    table = Table(title='accuracy of linear probes, percent')
    for column in ('', *results[0]['accuracies']):
        table.add_column(column, justify='right' if column else 'left')
    for row in probe_rows(results):
        table.add_row(*row)
    return table


def probe_rows(results: Sequence[dict]) -> list[list[str]]:
    """The cells of the table."""
    return [
        [result['name'], *(f'{value:.1f}' for value in result['accuracies'].values())]
        for result in results
    ]


def read_folder(folder: Path) -> list[dict]:
    """Reads all result files of a folder, in the order in which they were written."""
    results = read_results(folder.glob('*.json'))
    return sorted(results, key=lambda result: result['position'])


def probe_checkpoints(
    config: str,
    checkpoints: Mapping[str, str],
    count: int | None = None,
    options: Sequence[str] = (),
) -> list[dict]:
    """Probes the stages of trained networks.

    Args:
        config: Path of the config of the plain model.
        checkpoints: Path of each network's checkpoint, by its name.
        count: Images, from the first. Defaults to all.
        options: Settings that override the config, each ``KEY=VALUE``.

    Returns:
        A record of each network.

    Raises:
        ValueError: If there are too few images.
    """
    cfg = load_config(config, options)
    command = ['mim', 'run', 'man_mm', 'probe_stages', config]
    command += [f'{name}={path}' for name, path in checkpoints.items()]
    command += ['--images', str(count)] if count else []
    command += ['--cfg-options', *options] if options else []
    records = []
    for position, (name, path) in enumerate(checkpoints.items()):
        with quiet():
            model = MODELS.build(whole_model(cfg)).eval()
            load_checkpoint(model, path, map_location='cpu', strict=True)
        records.append(
            dict(
                name=name,
                position=position,
                config=config,
                options=list(options),
                images=count,
                accuracies=fit_probes(*read_features(cfg, model, count)),
                versions=versions(),
                **provenance('cpu'),
                command=shlex.join(command),
            )
        )
    return records


def write_records(records: Sequence[dict], out: Path) -> None:
    """Writes a JSON file for each network."""
    out.mkdir(parents=True, exist_ok=True)
    for record in records:
        path = out / f'{slug(record["name"])}.json'
        path.write_text(json.dumps(record, indent=2) + '\n')
