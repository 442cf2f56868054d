"""Assigning in slices gives what mmdet's assigner gives, in less memory.

``python tests/test_aux_heads/test_sliced_assigner.py`` writes the table of
docs/detectors.md on images with many objects.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from mmdet.models.task_modules.assigners import ATSSAssigner
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import batch_of, build_detector, build_wrapper, detector_config

from man_mm.aux_heads.sliced_assigner import SlicedAssigner
from man_mm.measure.memory import measure_memory

DOCUMENT = Path(__file__).parents[2] / 'docs/detectors.md'
START, END = '<!-- crowded -->', '<!-- end of crowded -->'
COUNTS = (1, 100, 1000)
KINDS = {'RetinaNet': 'retinanet', 'ATSS': 'atss', 'Faster R-CNN': 'faster_rcnn'}
LEVELS = [(32, 8), (16, 16), (8, 32)]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')  # of the assigner's own parts


def anchors():
    """One a location, four strides wide."""
    boxes = []
    for size, stride in LEVELS:
        steps = (torch.arange(size) + 0.5) * stride
        centers = torch.cartesian_prod(steps, steps)
        boxes.append(torch.cat([centers - 4 * stride, centers + 4 * stride], 1))
    return InstanceData(priors=torch.cat(boxes))


def objects(count):
    rng = torch.Generator().manual_seed(count)
    corners = 200 * torch.rand(count, 2, generator=rng)
    sizes = 4 + 100 * torch.rand(count, 2, generator=rng)
    labels = torch.randint(20, (count,), generator=rng)
    return InstanceData(bboxes=torch.cat([corners, corners + sizes], 1), labels=labels)


def assign(assigner, count):
    levels = [size**2 for size, _ in LEVELS]
    return assigner.assign(anchors(), levels, objects(count))


@pytest.mark.parametrize('count', [0, 1, 63, 64, 65, 300])
def test_slices_change_nothing(count):
    whole = assign(ATSSAssigner(topk=9), count)
    parts = assign(SlicedAssigner(ATSSAssigner(topk=9)), count)
    assert parts.num_gts == whole.num_gts == count
    for name in ('gt_inds', 'max_overlaps', 'labels'):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    if count:
        assert whole.gt_inds.any()
        assert not torch.equal(  # control
            assign(ATSSAssigner(topk=9), count + 64).gt_inds, whole.gt_inds
        )


def test_memory_does_not_grow_with_objects():
    def peak(assigner, count):
        return measure_memory(lambda: assign(assigner, count)).peak

    sliced = SlicedAssigner(ATSSAssigner(topk=9))
    assert peak(sliced, 640) < 1.2 * peak(sliced, 64)
    plain = ATSSAssigner(topk=9)
    assert peak(plain, 640) > 5 * peak(plain, 64)  # control


def peaks(kind):
    """Peak bytes of a step end to end and by local learning, for each of COUNTS."""
    rows = []
    for local in (False, True):
        model = build_detector(detector_config(kind, 18))
        sgd = dict(type='SGD', lr=1e-4, momentum=0.9)
        if local:
            wrapper = build_wrapper(model, optimizer=sgd)
        else:
            wrapper = build_optim_wrapper(
                model, dict(type='OptimWrapper', optimizer=sgd)
            )
        row = []
        for count in (1, *COUNTS):  # the first makes the optimizer's state
            batch = batch_of(1, 256, 256)
            sample = batch['data_samples'][0]
            crowd = objects(count)
            sample.gt_instances = type(sample.gt_instances)(
                bboxes=crowd.bboxes, labels=crowd.labels
            )
            model.zero_grad()
            step = partial(model.train_step, batch, wrapper)
            report = measure_memory(step, split=False)
            row.append(report.peak)
        rows.append(row[1:])
    return rows


def table():
    heads = [f'{count} {"box" if count == 1 else "boxes"}' for count in COUNTS]
    lines = ['| | | ' + ' | '.join(heads) + ' |', '|---' * (len(COUNTS) + 2) + '|']
    for title, kind in KINDS.items():
        for name, row in zip(('end to end', 'local'), peaks(kind), strict=True):
            cells = ' | '.join(f'{peak / 2**20:.0f}' for peak in row)
            lines.append(f'| {title} | {name} | {cells} |')
    return '\n'.join(lines)


@pytest.mark.slow
def test_crowded_images_are_no_worse_than_end_to_end():
    for kind in KINDS.values():
        plain, local = peaks(kind)
        for a, b in zip(plain, local, strict=True):
            assert b <= a


def test_the_heads_assign_in_slices():
    model = build_detector(detector_config('retinanet', 18))
    head = build_wrapper(model).learner.heads[0]
    assert isinstance(head.detector.head.assigner, SlicedAssigner)


if __name__ == '__main__':
    before, _, rest = DOCUMENT.read_text().partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f'{before}{START}\n{table()}\n{END}{after}')
