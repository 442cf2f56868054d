"""A model split over processes by FSDP2 learns what one copied to each of them does.

``python tests/test_engine/test_fully_sharded.py`` writes what works into
docs/support.md.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
import test_distributed
import torch
from conftest import (
    build_classifier,
    build_restorer,
    build_wrapper,
    image_pairs,
    labelled_images,
)
from documents import read_marked, write_marked
from mmengine.model import MMDistributedDataParallel
from mmengine.utils.misc import apply_to
from short_runs import different
from test_distributed import in_processes, share

from man_mm import FullyShardedModel

DOCUMENT = Path(__file__).parents[2] / 'docs/support.md'
START, END = '<!-- sharded -->', '<!-- end of sharded -->'
# As mmengine's runner makes it.
DDP = partial(MMDistributedDataParallel, broadcast_buffers=False)
ADAM = dict(type='AdamW', lr=1e-3, weight_decay=0.1)
EXACT = {
    'module': {},
    'iteration': dict(
        update='iteration',
        optimizer=ADAM,
        recompute=['backbone.layer2', 'backbone.layer4'],
    ),
    'bfloat16': dict(amp=dict(dtype='bfloat16'), micro_batch_size=2),
    'float16': dict(amp=dict(dtype='float16', loss_scale=8.0)),
    'end to end': dict(
        partition=dict(type='CutPartition', cuts=[]),
        clip_grad=dict(type='value', clip_value=1e-3),
    ),
}
CLOSE = {
    'accumulated': dict(
        accumulate=2, optimizer=ADAM, clip_grad=dict(max_norm=1e-3, norm_type='inf')
    ),
    'clipped as one': dict(
        clip_grad=dict(max_norm=1e-2), clip='global', update='iteration'
    ),
}
BITWISE, ROUNDING = 'bitwise', 'up to rounding'
RESUMING = 'test_checkpoints_and_resuming', 'test_fully_sharded_runs.py'
END_TO_END = 'test_equals_data_parallel', 'test_fully_sharded_end_to_end.py'
ERRORS = 'test_errors', 'test_fully_sharded_runs.py'
# What works, or is refused, with its test: a case or a test here, or of another file.
ROWS = {
    "`update='module'`": (BITWISE, 'module'),
    "`update='iteration'`": (BITWISE, 'iteration'),
    '`recompute`': (BITWISE, 'iteration'),
    '`micro_batch_size`': (BITWISE, 'bfloat16'),
    '`AmpLocalLearningOptimWrapper`, bfloat16': (BITWISE, 'bfloat16'),
    '`AmpLocalLearningOptimWrapper`, float16': (BITWISE, 'float16'),
    'one module (K = 1)': (BITWISE, 'end to end'),
    '`clip_grad` by value': (BITWISE, 'end to end'),
    '`clip_grad` by norm, a module at a time': (ROUNDING, 'test_four_processes'),
    "`clip_grad` by norm, `clip='global'`": (ROUNDING, 'clipped as one'),
    '`accumulative_counts`': (ROUNDING, 'accumulated'),
    '`shard_size`, four processes': (ROUNDING, 'test_four_processes'),
    '`end_to_end_from`, exact steps': (BITWISE, *END_TO_END),
    '`end_to_end_from`, joint steps': (BITWISE, *END_TO_END),
    'a change from local steps to either': (BITWISE, *END_TO_END),
    'the same, where a neck or a global skip reads boundaries': (
        ROUNDING,
        'test_other_models',
        END_TO_END[1],
    ),
    '`offload`': ('bitwise, as without it', 'test_mixed_precision_and_offloading'),
    '`mixed_precision`': (
        'in direction, within 1 %',
        'test_mixed_precision_and_offloading',
    ),
    'resuming': (BITWISE, *RESUMING),
    'resuming on 1, 2 or 4 processes, sharded or not': (BITWISE, *RESUMING),
    'validating while training': (BITWISE, 'module'),
    '`FullyShardedRunner`': (
        BITWISE,
        'test_trains_as_from_whole_copies',
        'test_fully_sharded_start.py',
    ),
    '`EMAHook`': ('refused', *ERRORS),
    '`compile`': ('refused', *ERRORS),
}
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope='module', autouse=True)
def imported():
    """Training once imports what each forked process would import by itself."""
    model = build_classifier(18)
    model.train_step(batches(1)[0], build_wrapper(model))


def batches(count=2):
    torch.manual_seed(7)
    return [labelled_images(8, 32) for _ in range(count)]


def train_steps(kind, rank, world, model, data, accumulate=1, **options):
    """Trains on this rank's share; returns what rank 0 would save, and predictions."""
    wrapped = kind(model)
    torch.manual_seed(rank)  # heads differ before they are broadcast
    wrapper = build_wrapper(wrapped, **options)
    wrapper._accumulative_counts = accumulate
    wrapped.can_save = True
    wrapper.initialize_count_status(wrapped, 0, accumulate * len(data))
    scores = []
    for batch in data:
        mine = share(batch, rank, world)
        for part in range(accumulate):
            wrapped.train_step(share(mine, part, accumulate), wrapper)
        if hasattr(model, 'head'):
            wrapped.eval()
            scores += [sample.pred_score for sample in wrapped.val_step(mine)]
            wrapped.train()
    saved = dict(state_dict=model.state_dict(), optimizer=wrapper.state_dict())
    if isinstance(wrapped, FullyShardedModel):
        saved = wrapped.gather(wrapper, tempfile.gettempdir())
    copies = apply_to(saved, torch.is_tensor, torch.Tensor.clone)
    return dict(copies['state_dict']), copies['optimizer'], scores


def train_classifier(kind, rank, world, **options):
    model = build_classifier(18)
    if 'amp' not in options:
        model.double()
    return train_steps(kind, rank, world, model, batches(), **options)


def train_both(rank, world, cases, kind=FullyShardedModel):
    return {
        name: [train_classifier(k, rank, world, **options) for k in (DDP, kind)]
        for name, options in cases.items()
    }


def test_equals_data_parallel(tmp_path):
    rank0, rank1 = in_processes(train_both, tmp_path, 2, EXACT | CLOSE)
    for name in EXACT | CLOSE:
        copied, sharded = rank0[name]
        if name in EXACT:
            assert not different(copied, sharded, name)
        close(sharded, copied)
        close(rank1[name][1][2], rank1[name][0][2])  # predictions
    plain, clipped = rank0['module'][1], rank0['clipped as one'][1]
    assert different(plain[0], clipped[0])  # control: what is compared does something


@pytest.mark.parametrize('shard_size', [4, 2])
def test_four_processes(tmp_path, shard_size):
    """Four parts of one copy, and two parts of each of two copies."""
    cases = {'clipped': dict(optimizer=ADAM, clip_grad=dict(max_norm=1e-3))}
    kind = partial(FullyShardedModel, shard_size=shard_size)
    rank0, *_ = in_processes(train_both, tmp_path, 4, cases, kind)
    copied, sharded = rank0['clipped']
    close(sharded, copied)


def train_detectors(rank, world):
    """Models with scalar parameters, and with several heads."""
    results = {}
    for name in ('atss', 'retinanet'):
        data = test_distributed.batches(name)
        build = partial(test_distributed.build, name)
        results[name] = [
            train_steps(kind, rank, world, build(), data, clip_grad=dict(max_norm=1.0))
            for kind in (DDP, FullyShardedModel)
        ]
    return results


def test_detectors(tmp_path):
    rank0, _ = in_processes(train_detectors, tmp_path, 2)
    for name, (copied, sharded) in rank0.items():
        rtol = 1e-5 if name == 'retinanet' else 1e-9
        torch.testing.assert_close(sharded, copied, rtol=rtol, atol=rtol)


def train_restorer(rank, world):
    """A model with a global skip."""
    pairs = [image_pairs(size=4, seed=seed) for seed in range(2)]
    return [
        train_steps(kind, rank, world, build_restorer('edsr').double(), pairs)
        for kind in (DDP, FullyShardedModel)
    ]


def test_a_restorer(tmp_path, mmagic):
    (copied, sharded), _ = in_processes(train_restorer, tmp_path, 2)
    torch.testing.assert_close(sharded, copied, rtol=1e-9, atol=1e-9)


def train_apart(rank, world):
    """Without a sum over ranks, of norms and then of gradients."""
    norm = dict(clip_grad=dict(max_norm=1e-3))
    right = train_classifier(FullyShardedModel, rank, world, **norm)
    gather = torch.distributed.all_gather

    def alone(outputs, own, group=None):
        for output in outputs:
            output.copy_(own)

    torch.distributed.all_gather = alone
    own_norm = train_classifier(FullyShardedModel, rank, world, **norm)
    torch.distributed.all_gather = gather
    shard = FullyShardedModel.shard

    def shard_without_reducing(self, learner):
        shard(self, learner)
        for module in self.modules():
            if hasattr(module, 'set_gradient_divide_factor'):
                module.set_gradient_divide_factor(1.0)

    FullyShardedModel.shard = shard_without_reducing
    added = train_classifier(FullyShardedModel, rank, world)
    return right, own_norm, added, train_classifier(DDP, rank, world)


def test_control_without_averages(tmp_path):
    rank0, _ = in_processes(train_apart, tmp_path, 2)
    right, own_norm, added, averaged = rank0
    assert different(right[0], own_norm[0])
    assert different(averaged[0], added[0])


def train_in_other_ways(rank, world):
    """With modules that compute in bfloat16, and with an offloaded optimizer."""
    policy = dict(param_dtype='bfloat16', reduce_dtype='float32')
    mixed = partial(FullyShardedModel, mixed_precision=policy)
    kinds = dict(
        plain=FullyShardedModel,
        mixed=mixed,
        offloaded=partial(FullyShardedModel, offload=True),
    )
    pairs = [image_pairs(size=4, seed=seed) for seed in range(3)]
    learned = {
        name: train_steps(kind, rank, world, build_restorer('edsr'), pairs)[0]
        for name, kind in kinds.items()
    }
    with pytest.raises(ValueError, match='AmpLocalLearningOptimWrapper'):
        build_wrapper(mixed(build_classifier(18)))
    return learned


def test_mixed_precision_and_offloading(tmp_path):
    start = build_restorer('edsr').state_dict()
    rank0, _ = in_processes(train_in_other_ways, tmp_path, 2)
    plain, mixed, offloaded = rank0.values()
    assert not different(plain, offloaded)
    moves = [
        torch.cat([(end[key] - start[key]).flatten() for key in start if 'body' in key])
        for end in (plain, mixed)
    ]
    assert mixed.keys() == start.keys()
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert not torch.equal(*moves)  # control
    assert torch.cosine_similarity(*moves, dim=0) > 0.99


def source_of(name, file='test_fully_sharded.py'):
    """The test of a row."""
    if name in EXACT | CLOSE:
        name = 'test_equals_data_parallel'
    assert f'def {name}(' in (Path(__file__).parent / file).read_text()
    return f'[`{name}`](../tests/test_engine/{file})'


def table():
    lines = [
        '| with `FullyShardedModel` | equals data parallel | test |',
        '|---|---|---|',
    ]
    for title, (result, *test) in ROWS.items():
        lines.append(f'| {title} | {result} | {source_of(*test)} |')
    return '\n'.join(lines)


def test_the_document_has_this_table():
    for result, cases in ((BITWISE, EXACT), (ROUNDING, CLOSE)):
        listed = {row[1] for row in ROWS.values() if row[0] == result}
        assert listed >= set(cases)
    assert read_marked(DOCUMENT, START, END) == table()


if __name__ == '__main__':
    write_marked(DOCUMENT, START, END, table())
