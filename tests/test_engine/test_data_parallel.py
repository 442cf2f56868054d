"""DDP keeps no buckets of gradients that local learning averages by itself."""

from functools import partial

import pytest
import torch
from conftest import build_wrapper
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from test_distributed import batches, build, in_processes, same, share, state
from torch.profiler import ProfilerActivity, profile

from man_mm.engine import constructor
from man_mm.engine.data_parallel import free_buckets


@pytest.fixture(scope='module', autouse=True)
def imported():
    """Training once imports what each forked process would import by itself."""
    model = build('classifier')
    model.train_step(batches('classifier', 1)[0], build_wrapper(model))


def bytes_kept(function, *args):
    """Bytes that a call has allocated on the CPU, by whomever, and not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function(*args)
    return result, sum(event.self_cpu_memory_usage for event in recorded.key_averages())


def count_buckets(rank, world):
    """Bytes that DDP adds to a model, before and after it is about to be trained."""
    counts = []
    for free in (free_buckets, lambda model: None):
        constructor.free_buckets = free
        model = build('classifier')
        weights = sum(param.nbytes for param in model.parameters())
        # Copies for broadcasts would be freed in threads that are not recorded.
        wrapped, added = bytes_kept(
            partial(MMDistributedDataParallel, init_sync=False), model
        )
        wrapper, more = bytes_kept(build_wrapper, wrapped)
        heads = sum(param.nbytes for param in wrapper.learner.heads.parameters())
        shares = [added / weights, (added + more - heads) / weights]
        wrapped.train_step(share(batches('classifier', 1)[0], rank, world), wrapper)
        counts.append((shares, state(model, wrapper)))
    return counts


def test_no_buckets(tmp_path):
    for (freed, end), (kept, end_of_control) in in_processes(
        count_buckets, tmp_path, 2
    ):
        assert freed == pytest.approx([1, 0], abs=0.02)
        assert kept == pytest.approx([1, 1], abs=0.02)  # control
        assert same(end, end_of_control)


def train_otherwise(rank, world):
    """What DDP says when another optimizer wrapper trains the model afterwards."""
    model = build('classifier')
    wrapped = MMDistributedDataParallel(model)
    free_buckets(wrapped)
    batch = share(batches('classifier', 1)[0], rank, world)
    stock = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        predicted = wrapped.eval().val_step(batch)
    wrapped.train()
    with pytest.raises(RuntimeError, match='wrap the plain model') as error:
        wrapped.train_step(batch, stock)
    MMDistributedDataParallel(model).train_step(batch, stock)
    return str(error.value), len(predicted)


def test_other_training_is_refused(tmp_path):
    for told, predictions in in_processes(train_otherwise, tmp_path, 2):
        assert 'averages them' in told
        assert predictions == 2
