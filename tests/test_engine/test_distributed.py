"""Two processes on half of the batch each equal one process on the joint batch."""

import os
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from conftest import batch_of, build_detector, build_wrapper, detector_config


def half(batch, rank):
    return {key: value[rank::2] for key, value in batch.items()}


def config():
    # ATSS divides its losses by what all ranks found, RetinaNet by its own rank's.
    return detector_config('atss', 18)


def batches():
    # Not smaller: on a map of one location, GroupNorm magnifies rounding errors.
    return [batch_of(2, 128, 128) for _ in range(2)]


def worker(rank, port, folder, update, average):
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2'
    )
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    from mmengine.model import MMDistributedDataParallel

    from man_mm.engine import optim_wrapper
    from man_mm.engine.distributed import average_tensors

    if not average:
        optim_wrapper.average_gradients = lambda params: None
    model = MMDistributedDataParallel(
        build_detector(config()).double(), broadcast_buffers=False
    )
    # Heads differ before they are broadcast from rank 0.
    torch.manual_seed(rank)
    wrapper = build_wrapper(model, update=update)
    for batch in batches():
        model.train_step(half(batch, rank), wrapper)
        average_tensors(wrapper.learner.bank.moments())
    torch.save(
        (
            model.module.state_dict(),
            wrapper.learner.heads.state_dict(),
            wrapper.learner.bank.moments(),
        ),
        f'{folder}/{rank}.pth',
    )
    torch.distributed.destroy_process_group()


def run_two(tmp_path, port, update='module', average=True):
    mp.spawn(worker, (port, str(tmp_path), update, average), nprocs=2)
    return [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]


def flat(result):
    state, heads, moments = result
    return [*state.values(), *heads.values(), *moments]


@pytest.mark.parametrize('update', ['module', 'iteration'])
def test_two_processes_equal_one(tmp_path, update):
    ranks = run_two(tmp_path, 29511 + len(update), update)
    assert all(
        torch.equal(a, b) for a, b in zip(flat(ranks[0]), flat(ranks[1]), strict=True)
    )
    model = build_detector(config()).double()
    torch.manual_seed(0)
    wrapper = build_wrapper(model, update=update)
    for batch in batches():
        model.train_step(batch, wrapper)
    one = (
        model.state_dict(),
        wrapper.learner.heads.state_dict(),
        wrapper.learner.bank.moments(),
    )
    for a, b in zip(flat(one), flat(ranks[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_control_without_averaging(tmp_path):
    ranks = run_two(tmp_path, 29531, average=False)
    assert not all(
        torch.equal(a, b) for a, b in zip(flat(ranks[0]), flat(ranks[1]), strict=True)
    )
