"""Processes that share a batch equal one process on the joint batch."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    build_wrapper,
    detector_config,
    labelled_images,
)
from mmengine.model import MMDistributedDataParallel

from man_mm.engine import optim_wrapper
from man_mm.engine.distributed import average_tensors
from man_mm.engine.out_of_memory import explains_out_of_memory


def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def start(rank, world, port, seconds=120):
    """Sets up a process that was forked, which is faster than importing torch."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))


def in_processes(function, folder, world, *args):
    """Runs ``function(rank, world, *args)`` on each rank; returns what they return."""

    def work(rank, port):
        start(rank, world, port)
        torch.save(function(rank, world, *args), f'{folder}/{rank}.pth')
        torch.distributed.destroy_process_group()

    mp.start_processes(work, (free_port(),), nprocs=world, start_method='fork')
    return [torch.load(f'{folder}/{rank}.pth') for rank in range(world)]


def share(batch, rank, world):
    return {key: value[rank::world] for key, value in batch.items()}


def build(kind):
    if kind == 'classifier':
        return build_classifier(18)
    # ATSS divides its losses by what all ranks found, RetinaNet by its own rank's.
    cfg = detector_config(kind, 18)
    cfg.model.neck.out_channels = 64
    cfg.model.bbox_head.update(in_channels=64, feat_channels=64, stacked_convs=1)
    model = build_detector(cfg)
    return model.double() if kind == 'atss' else model


def batches(kind, count=2):
    torch.manual_seed(7)
    if kind == 'classifier':
        return [labelled_images(4, 32) for _ in range(count)]
    # On a map of one location, GroupNorm of ATSS magnifies rounding errors.
    side = 128 if kind == 'atss' else 64
    return [batch_of(4, side, side) for _ in range(count)]


def state(model, wrapper):
    learner = wrapper.learner
    return [
        *model.state_dict().values(),
        *learner.heads.state_dict().values(),
        *([] if learner.bank is None else learner.bank.moments()),
    ]


def train(rank, world, kind, accumulate=1, average=True, **options):
    """Trains on this rank's share, in ``accumulate`` parts."""
    if not average:
        optim_wrapper.average_gradients = lambda params: lambda: None
    model = build(kind)
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    # Heads differ before they are broadcast from rank 0.
    torch.manual_seed(rank)
    wrapper = build_wrapper(wrapped, **options)
    wrapper._accumulative_counts = accumulate
    for batch in batches(kind):
        mine = share(batch, rank, world)
        for part in range(accumulate):
            wrapped.train_step(share(mine, part, accumulate), wrapper)
            if wrapper.learner.bank is not None:  # exact steps have none
                average_tensors(wrapper.learner.bank.moments())
    return state(model, wrapper)


def train_alone(kind, parts=(slice(None),), **options):
    """Trains on the whole batch, or on some parts of it, accumulated."""
    model = build(kind)
    torch.manual_seed(0)
    wrapper = build_wrapper(model, **options)
    wrapper._accumulative_counts = len(parts)
    for batch in batches(kind):
        for part in parts:
            some = {key: value[part] for key, value in batch.items()}
            model.train_step(some, wrapper)
    return state(model, wrapper)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_params(a, b, kind='classifier'):
    """Running statistics of batch norm aside, which are each rank's own."""
    model = build(kind)
    names = dict(model.named_parameters())
    states = zip(model.state_dict(), a, b, strict=False)
    return all(torch.equal(x, y) for name, x, y in states if name in names)


@pytest.mark.parametrize(
    'world, accumulate, update',
    [(2, 1, 'module'), (2, 2, 'iteration'), (4, 1, 'module')],
)
def test_processes_equal_one(tmp_path, world, accumulate, update):
    ranks = in_processes(
        lambda rank, size: train(rank, size, 'atss', accumulate, update=update),
        tmp_path,
        world,
    )
    assert all(same(ranks[0], other) for other in ranks[1:])
    size = 4 // accumulate
    parts = [slice(i * size, (i + 1) * size) for i in range(accumulate)]
    one = train_alone('atss', parts, update=update)
    for a, b in zip(one, ranks[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    'steps',
    [
        dict(amp=None),
        dict(amp=dict(dtype='bfloat16')),
        dict(end_to_end_from=0),
        dict(end_to_end_from=0, local_loss_weight=0.1),
    ],
)
def test_two_processes_equal_accumulation_bitwise(tmp_path, steps):
    """The sum of two gradients has one order, and half of one is exact."""
    options = dict(aux_head=dict(use_bank=False), **steps)
    ranks = in_processes(
        lambda rank, size: train(rank, size, 'classifier', **options), tmp_path, 2
    )
    halves = [slice(rank, None, 2) for rank in range(2)]
    one = train_alone('classifier', halves, **options)
    assert same_params(ranks[0], one)
    assert not same_params(ranks[0], train_alone('classifier', **options))  # control


def test_control_without_averaging(tmp_path):
    ranks = in_processes(
        lambda rank, size: train(rank, size, 'classifier', average=False), tmp_path, 2
    )
    assert not same_params(*ranks)


def count_bytes(rank, world):
    """Bytes of gradients that a rank sends in a step, by end-to-end DDP and by ours."""
    sent = []

    def counted(_state, bucket):
        sent.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    batch = share(batches('retinanet', 1)[0], rank, world)
    plain = MMDistributedDataParallel(build('retinanet'))
    plain.register_comm_hook(None, counted)
    data = plain.module.data_preprocessor(batch, training=True)
    losses = plain(**data, mode='loss')
    plain.module.parse_losses(losses)[0].backward()
    end_to_end = sum(sent)
    sent.clear()

    model = MMDistributedDataParallel(build('retinanet'))
    wrapper = build_wrapper(model)
    all_reduce = torch.distributed.all_reduce

    def spy(tensor, *args, **kwargs):
        if kwargs.get('async_op'):
            sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = spy
    model.train_step(batch, wrapper)
    heads = sum(p.nbytes for p in wrapper.learner.heads.parameters())
    flags = 4 * sum(len(wrapper.learner.params(m)) for m in wrapper.learner.modules)
    return end_to_end, sum(sent), heads, flags


def test_traffic_is_that_of_end_to_end_training(tmp_path):
    for end_to_end, ours, heads, flags in in_processes(count_bytes, tmp_path, 2):
        assert ours == end_to_end + heads + flags
        assert flags < 1e-3 * ours


def reduces_beside_the_next_module(rank, world):
    model = MMDistributedDataParallel(build('classifier'))
    wrapper = build_wrapper(model)
    events = []
    average = optim_wrapper.average_gradients

    def spy(params):
        wait = average(params)
        events.append('start')
        return lambda: (events.append('wait'), wait())

    optim_wrapper.average_gradients = spy
    for module in wrapper.learner.modules[1:]:
        first = model.module.get_submodule(module.units[0].name)
        first.register_forward_pre_hook(lambda *_: events.append('forward'))
    model.train_step(share(batches('classifier', 1)[0], rank, world), wrapper)
    return events


def test_reduction_runs_beside_the_next_module(tmp_path):
    next_module = ['forward', 'start', 'wait']
    for events in in_processes(reduces_beside_the_next_module, tmp_path, 2):
        assert events == ['start', *3 * next_module, 'wait']


def train_without_boxes(rank, world):
    """Rank 1 has no boxes; rank 0 has."""
    model = MMDistributedDataParallel(build('retinanet'))
    wrapper = build_wrapper(model)
    batch = share(batches('retinanet', 1)[0], rank, world)
    if rank == 1:
        for sample in batch['data_samples']:
            sample.gt_instances = sample.gt_instances[:0]
    model.train_step(batch, wrapper)
    return list(model.module.state_dict().values())


def test_a_rank_without_boxes(tmp_path):
    ranks = in_processes(train_without_boxes, tmp_path, 2)
    assert same_params(*ranks, 'retinanet')


def first_buffers(rank, world, broadcasts):
    """Running statistics with which each of three steps begins."""
    model = MMDistributedDataParallel(build('classifier'), broadcast_buffers=broadcasts)
    wrapper = build_wrapper(model)
    norm, seen = model.module.backbone.bn1, []
    model.module.register_forward_pre_hook(
        lambda *_: seen.append(norm.running_mean.clone())
    )
    for batch in batches('classifier', 3):
        model.train_step(share(batch, rank, world), wrapper)
    return seen


@pytest.mark.parametrize('broadcasts', [True, False])
def test_buffers_are_broadcast_before_each_step(tmp_path, broadcasts):
    ranks = in_processes(
        lambda rank, world: first_buffers(rank, world, broadcasts), tmp_path, 2
    )
    equal = [torch.equal(a, b) for a, b in zip(*ranks, strict=True)]
    assert equal == [True, broadcasts, broadcasts]  # control: without, they differ


def run_out_of_memory(*_):
    raise torch.OutOfMemoryError('CUDA out of memory.')


def runs_out_of_memory(rank, port, folder):
    """Rank 1 runs out of memory in its second step."""
    start(rank, 2, port, seconds=50)
    model = MMDistributedDataParallel(build('classifier'))
    wrapper = build_wrapper(model)
    wrapper._measure = lambda shape: (folder / 'measured').touch()
    batch = share(batches('classifier', 1)[0], rank, 2)
    model.train_step(batch, wrapper)
    if rank == 1:
        model.module.backbone.layer2.register_forward_hook(run_out_of_memory)
    try:
        model.train_step(batch, wrapper)
    except RuntimeError as error:
        (folder / f'{rank}').write_text(str(error))
        os._exit(1)


def test_out_of_memory_on_one_rank_ends_all(tmp_path):
    wrapper = build_wrapper(build('classifier'))
    explained = explains_out_of_memory(
        wrapper.learner,
        lambda shape: (tmp_path / 'control').touch(),
        lambda: (2, 3, 8, 8),
        wrapper.dial.module_under_way,
    )
    with pytest.raises(torch.OutOfMemoryError), explained:
        run_out_of_memory()
    assert (tmp_path / 'control').exists()  # one process measures

    context, port = mp.get_context('fork'), free_port()
    ranks = [
        context.Process(target=runs_out_of_memory, args=(rank, port, tmp_path))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    ranks[1].join(45)
    ranks[0].join(5)
    ended = [not process.is_alive() for process in ranks]
    for process in ranks:
        process.kill()
    assert ended == [True, True]
    assert 'module3 of 4' in (tmp_path / '1').read_text()
    assert 'Another rank' in (tmp_path / '0').read_text()
    assert not (tmp_path / 'measured').exists()


@pytest.mark.parametrize('trouble', ['dies', 'hangs'])
def test_a_dead_rank_ends_the_others(tmp_path, trouble):
    def work(rank, port):
        start(rank, 2, port, seconds=8)
        # As mmengine's runner makes it: the first message is then ours.
        model = MMDistributedDataParallel(build('classifier'), broadcast_buffers=False)
        wrapper = build_wrapper(model)
        batch = share(batches('classifier', 1)[0], rank, 2)
        model.train_step(batch, wrapper)
        if rank == 1:
            time.sleep(0 if trouble == 'dies' else 60)
            os._exit(1)
        try:
            model.train_step(batch, wrapper)
        except RuntimeError as error:
            (tmp_path / 'error').write_text(str(error))

    context = mp.get_context('fork')
    port = free_port()
    ranks = [context.Process(target=work, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(50)
    ended = not ranks[0].is_alive()
    for process in ranks:
        process.kill()
    assert ended
    assert 'Another rank' in (tmp_path / 'error').read_text()
