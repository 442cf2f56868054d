"""Images with many objects need no more memory than in end-to-end training.

``python tests/test_aux_heads/test_crowded_images.py`` writes the table of
docs/detectors.md.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import batch_of, build_detector, build_wrapper, detector_config
from dense_heads import build_reference, reference_targets
from documents import read_marked, write_marked

from man_mm.aux_heads import detector
from man_mm.measure.memory import measure_memory

DOCUMENT = Path(__file__).parents[2] / 'docs/detectors.md'
START, END = '<!-- crowded -->', '<!-- end of crowded -->'
COUNTS = (1, 100, 1000)
KINDS = {'RetinaNet': 'retinanet', 'ATSS': 'atss', 'Faster R-CNN': 'faster_rcnn'}
SIDE = 256


def crowded(count):
    """A batch of one image with many objects."""
    batch = batch_of(1, SIDE, SIDE)
    rng = torch.Generator().manual_seed(count)
    corners = 0.8 * SIDE * torch.rand(count, 2, generator=rng)
    sizes = 4 + 0.2 * SIDE * torch.rand(count, 2, generator=rng)
    boxes = torch.cat([corners, (corners + sizes).clamp(max=SIDE)], 1)
    labels = torch.randint(20, (count,), generator=rng)
    sample = batch['data_samples'][0]
    sample.gt_instances = type(sample.gt_instances)(bboxes=boxes, labels=labels)
    return batch


def peaks(kind, is_local, counts=COUNTS):
    """Peak bytes of a step for each number of objects."""
    model = build_detector(detector_config(kind, 18))
    sgd = dict(type='SGD', lr=1e-4, momentum=0.9)
    if is_local:
        wrapper = build_wrapper(model, optimizer=sgd)
    else:
        wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=sgd))
    found = []
    for count in (1, *counts):  # the first makes the optimizer's state
        batch = crowded(count)
        model.zero_grad()
        step = partial(model.train_step, batch, wrapper)
        found.append(measure_memory(step, split=False).peak)
    return found[1:]


def measure():
    """Peaks in MiB by detector, end to end and by local learning."""
    return {
        title: [
            [round(peak / 2**20) for peak in peaks(kind, is_local)]
            for is_local in (False, True)
        ]
        for title, kind in KINDS.items()
    }


def table(rows):
    heads = [f'{count} {"box" if count == 1 else "boxes"}' for count in COUNTS]
    lines = ['| | | ' + ' | '.join(heads) + ' |', '|---' * (len(COUNTS) + 2) + '|']
    for title, pair in rows.items():
        for name, row in zip(('end to end', 'local'), pair, strict=True):
            lines.append(f'| {title} | {name} | ' + ' | '.join(map(str, row)) + ' |')
    return '\n'.join(lines)


@pytest.mark.slow
def test_crowded_images_are_no_worse_than_end_to_end():
    rows = measure()
    for plain, local in rows.values():
        for a, b in zip(plain, local, strict=True):
            assert b <= a
    assert read_marked(DOCUMENT, START, END) == table(rows)


def test_heads_that_compare_all_at_once_would_be_worse(monkeypatch):
    ((plain,), (local,)) = (
        peaks('atss', is_local, (1000,)) for is_local in (False, True)
    )
    assert local <= plain
    strides = [4, 8, 16, 32, 64, 128]
    reference = build_reference(strides, 80)
    assign = detector.assign

    def and_as_mmdet_does(levels, valid, boxes, labels, num_classes):
        objects = [
            InstanceData(bboxes=some, labels=classes)
            for some, classes in zip(boxes, labels, strict=True)
        ]
        sizes = [(SIDE // stride, SIDE // stride) for stride in strides]
        reference_targets(reference, sizes, objects, [(SIDE, SIDE)])
        return assign(levels, valid, boxes, labels, num_classes)

    monkeypatch.setattr(detector, 'assign', and_as_mmdet_does)  # control
    assert peaks('atss', True, (1000,))[0] > plain


if __name__ == '__main__':
    write_marked(DOCUMENT, START, END, table(measure()))
