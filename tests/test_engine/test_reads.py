"""How often a step reads the device: the table of docs/support.md.

``python tests/test_engine/test_reads.py`` writes the table into the document.
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import (
    batch_of,
    build_cifar_classifier,
    build_detector,
    build_restorer,
    build_wrapper,
    detector_config,
    image_pairs,
    labelled_images,
)
from documents import read_marked, write_marked
from reads import count_reads

from man_mm.aux_heads import detector

DOCUMENT = Path(__file__).parents[2] / 'docs/support.md'
START, END = '<!-- reads -->', '<!-- end of reads -->'
OF_DETECTORS = '<!-- reads of detectors -->', '<!-- end of reads of detectors -->'
PRECISIONS = {
    'fp32': None,
    'bf16': dict(dtype='bfloat16'),
    'fp16': dict(dtype='float16', loss_scale=256.0),
}
ROWS = {
    'K = 1': dict(num_modules=1),
    'K = 4': dict(num_modules=4),
    'K = 7': dict(num_modules=7),
    'K = 16': dict(num_modules=16),
    'K = 7, `MomentumHead`': dict(num_modules=7, head='MomentumHead'),
}
DETECTORS = {
    'RetinaNet': ('retinanet', {}),
    'RetinaNet, K = 8': (
        'retinanet',
        dict(partition=dict(type='UniformPartition', num_modules=8)),
    ),
    'RetinaNet, `DGLDetHead`': ('retinanet', dict(aux_head=dict(type='DGLDetHead'))),
    'ATSS': ('atss', {}),
    'GFL': ('gfl', {}),
    'Faster R-CNN': ('faster_rcnn', {}),
}
STOCK = 2
WARM_UP = 1  # the first step of an optimizer waits: there is no state to go back to


def build(num_modules, head='MANHead', wrap=lambda model: model, **options):
    model = wrap(build_cifar_classifier(32))  # 16 units
    options = dict(clip_grad=dict(max_norm=10.0)) | options
    wrapper = build_wrapper(
        model,
        partition=dict(type='UniformPartition', num_modules=num_modules),
        aux_head=dict(type=head),
        **options,
    )
    return model, wrapper


def step(model, wrapper, batch):
    """A step, and what mmengine logs of it."""
    for name, value in model.train_step(batch, wrapper).items():
        wrapper.message_hub.update_scalar(f'train/{name}', value)


def reads_of(model, wrapper, batch=None, steps=WARM_UP):
    batch = batch or labelled_images(2, 16, classes=2)
    for _ in range(steps):
        step(model, wrapper, batch)
    with count_reads() as reads:
        step(model, wrapper, batch)
    return len(reads)


def stock_reads(model, batch=None):
    """Without ``clip_grad``, with which it has one more."""
    cfg = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
    return reads_of(model, build_optim_wrapper(model, cfg), batch)


def wrap_for(world):
    """What a runner wraps a model in, for a number of processes."""
    wrap = partial(MMDistributedDataParallel, broadcast_buffers=False)
    return wrap if world > 1 else lambda model: model


def measure(rank=0, world=1):
    """Reads by row and precision."""
    wrap = wrap_for(world)
    return {
        row: [
            reads_of(*build(wrap=wrap, amp=amp, **options))
            for amp in PRECISIONS.values()
        ]
        for row, options in ROWS.items()
    }


def measure_two(folder):
    from test_distributed import in_processes

    build_cifar_classifier()  # what is imported before the fork is imported once
    return in_processes(measure, folder, 2)


def local_reads_of(kind, wrap=lambda model: model, **options):
    model = wrap(build_detector(detector_config(kind, 18)))
    return reads_of(model, build_wrapper(model, **options), batch_of())


def measure_detectors():
    """Reads of a stock step and of a local one by detector."""
    stock = {
        kind: stock_reads(build_detector(detector_config(kind, 18)), batch_of())
        for kind, _ in DETECTORS.values()
    }
    return {
        row: (stock[kind], local_reads_of(kind, **options))
        for row, (kind, options) in DETECTORS.items()
    }


def table_of_detectors(rows):
    lines = ['| | stock mmengine | local learning |', '|---|---|---|']
    lines += [f'| {row} | {stock} | {local} |' for row, (stock, local) in rows.items()]
    return '\n'.join(lines)


def table(one, two):
    heads = [f'{name}, {who}' for who in ('one process', 'two') for name in PRECISIONS]
    lines = ['| | ' + ' | '.join(heads) + ' |', '|---' * 7 + '|']
    for row in ROWS:
        cells = map(str, [*one[row], *two[row]])
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def test_a_stock_step_has_one_and_a_local_step_one_more(tmp_path):
    # mmengine's for its loss, and one in the preprocessor of mmpretrain.
    assert stock_reads(build_cifar_classifier(32)) == STOCK
    one, two = measure(), measure_two(tmp_path)
    for row in ROWS:
        assert max(one[row]) <= STOCK + 1, row
        assert max(max(rank[row]) for rank in two) <= STOCK + 1, row
    assert read_marked(DOCUMENT, START, END) == table(one, two[0])


def test_detectors_have_one_more_too():
    rows = measure_detectors()
    for row, (stock, local) in rows.items():
        assert local <= stock + 1, row
    assert read_marked(DOCUMENT, *OF_DETECTORS) == table_of_detectors(rows)
    assert local_reads_of('retinanet', amp=PRECISIONS['bf16']) <= rows['RetinaNet'][0]


def reads_of_a_rank(rank, world):
    return local_reads_of('retinanet', wrap_for(world))


def test_a_detector_in_two_processes(tmp_path):
    from test_distributed import in_processes

    one = local_reads_of('retinanet')  # imports once what the fork needs
    assert in_processes(reads_of_a_rank, tmp_path, 2) == [one, one]


def test_a_loss_that_reads_is_found(monkeypatch):
    plain = local_reads_of('retinanet')
    average = detector._average
    monkeypatch.setattr(
        detector, '_average', lambda *x: [y.new_tensor(y.item()) for y in average(*x)]
    )
    assert local_reads_of('retinanet') == plain + 3 * 2  # control


def test_what_is_counted():
    x = torch.ones(2)
    for read in (
        lambda: x[0].item(),
        lambda: bool(x[0] > 0),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: 1 if x.sum() else 0,
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.unique(),
        lambda: x.masked_select(x > 0),
    ):
        with count_reads() as reads:
            read()
        assert len(reads) == 1
    with count_reads() as reads:
        torch.where(x > 0, x, 0).sum()
        x[torch.tensor([1, 0])]
    assert not reads  # control


@pytest.mark.parametrize('update', ['module', 'iteration', 'parameter'])
def test_each_way_to_update(update):
    model, wrapper = build(4, update=update, clip_grad=None)
    assert reads_of(model, wrapper) <= STOCK + 1


@pytest.mark.parametrize('head', ['DGLHead', 'InfoProHead', 'AugLocalHead'])
def test_heads_of_other_methods(head):
    assert reads_of(*build(4, head)) <= STOCK + 1


def test_a_restorer():
    stock = stock_reads(build_restorer('edsr'), image_pairs())
    model = build_restorer('edsr')
    assert reads_of(model, build_wrapper(model), image_pairs()) <= stock + 1


def test_a_step_that_reads_each_norm_is_found(monkeypatch):
    model, wrapper = build(7)
    flag = wrapper._stepper.flag
    monkeypatch.setattr(
        wrapper._stepper, 'flag', lambda name, x: flag(name, torch.tensor(bool(x)))
    )
    assert reads_of(model, wrapper) == STOCK + 1 + 7  # control


if __name__ == '__main__':
    with TemporaryDirectory() as folder:
        write_marked(DOCUMENT, START, END, table(measure(), measure_two(folder)[0]))
    write_marked(DOCUMENT, *OF_DETECTORS, table_of_detectors(measure_detectors()))
