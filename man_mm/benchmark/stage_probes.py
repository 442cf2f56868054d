r"""Measure how well each stage of trained networks tells classes apart: linear probes.

    mim run man_mm probe_stages configs/end_to_end/retinanet_r18_scenes.py \
        end-to-end=work_dirs/.../iter_900.pth MAN=work_dirs/.../iter_900.pth

A probe is a linear classifier on what a stage of the frozen backbone returns: on the
average of its map over an image of a classifier, over the box of each object of a
detector. It learns from one half of the config's validation images, and its accuracy is
that on the other half. Where local learning loses, this tells in which stage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.ops import roi_align

from man_mm.backbones import find_backbone, find_units, probe

from .comparison import read_results
from .records import provenance, versions
from .scheme_costs import load_config
from .training_runs import slug
from .training_steps import quiet

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
            maps[unit.name] = unit.as_map(output, args) if unit.as_map else output

        handles.append(model.get_submodule(unit.name).register_forward_hook(keep))
    loader = {**cfg.val_dataloader, 'num_workers': 0, 'persistent_workers': False}
    batches = Runner.build_dataloader(loader)
    features: dict[str, list[Tensor]] = {unit.name: [] for unit in ends.values()}
    labels, images, seen = [], [], 0
    for batch in track(batches, 'images', transient=True):
        with torch.no_grad():
            data = model.data_preprocessor(batch)
            find_backbone(model)[1](data['inputs'])
        boxes, found = _objects(data['data_samples'])
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


def _objects(samples: Sequence) -> tuple[list[Tensor] | None, list[Tensor]]:
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


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default the process's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='of the plain model')
    parser.add_argument('checkpoints', nargs='+', metavar='NAME=CHECKPOINT')
    parser.add_argument('--images', type=int, help='of the validation set; all else')
    parser.add_argument('--out', type=Path, help='folder of JSON files')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    options = parser.parse_args(args)
    pairs = [text.partition('=') for text in options.checkpoints]
    for text, (_, _, path) in zip(options.checkpoints, pairs, strict=True):
        if not Path(path).is_file():
            parser.error(f'write NAME=CHECKPOINT, with a file that exists: {text!r}')
    cfg = load_config(options.config, options.cfg_options)
    results = []
    for position, (name, _, path) in enumerate(pairs):
        with quiet():
            model = MODELS.build(whole_model(cfg)).eval()
            load_checkpoint(model, path, map_location='cpu', strict=True)
        try:
            accuracies = fit_probes(*read_features(cfg, model, options.images))
        except ValueError as error:
            sys.exit(f'probe_stages.py: {error}')
        words = [
            *('mim', 'run', 'man_mm', 'probe_stages'),
            *(args or sys.argv[1:]),
        ]
        results.append(
            dict(
                name=name,
                position=position,
                config=options.config,
                options=options.cfg_options,
                images=options.images,
                accuracies=accuracies,
                versions=versions(),
                **provenance('cpu'),
                command=shlex.join(map(str, words)),
            )
        )
    Console().print(make_table(results))
    for result in results if options.out else ():
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f'{slug(result["name"])}.json'
        path.write_text(json.dumps(result, indent=2) + '\n')
