"""What three processes run that train a network as a pipeline of modules."""

import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import (
    LABELS,
    OPTIMIZERS,
    WIDTH,
    PooledHead,
    all_params,
    build,
    build_global_skip,
    stage,
)
from torch import nn

from man_mm.core import MemoryBank
from man_mm.parallel import ModulePipeline
from man_mm.parallel.channel import Channel

torch.set_num_threads(1)

STEPS = 4


class StatisticsHead(PooledHead):
    """Reads averages of the first map, and the long-term memory of it."""

    reads = frozenset(['stage1'])
    reads_averages = True

    def forward(self, maps, targets, bank):
        *_, own = maps.values()
        first = maps['stage1'].mean((2, 3), keepdim=True)
        if known := bank.statistics('stage1'):
            mean, variance = known
            first = (first - mean[:, None, None]) / (1 + variance[:, None, None])
        return super().forward({'first': first, 'own': own}, targets, bank)


class Pyramid(nn.Module):
    """Reads the map of every stage, as a detector's neck does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        widths = (2, WIDTH, WIDTH, WIDTH)
        self.stages = nn.ModuleList(stage(width) for width in widths)
        self.stage1, self.stage2, self.stage3, self.stage4 = self.stages
        del self.stages
        self.neck = nn.Linear(4 * WIDTH, 3)

    def forward(self, x):
        stages = (self.stage1, self.stage2, self.stage3, self.stage4)
        maps = [x := stage(x) for stage in stages]
        return self.neck(torch.cat([map_.mean((2, 3)) for map_ in maps], 1))


def build_plain():
    return build(4, bank=MemoryBank(momentum=0.5))


def build_tokens():
    learner = build_plain()
    first, *others = learner.modules
    units = tuple(replace(u, as_map=lambda x, args: x) for u in first.units)
    learner.modules = (replace(first, units=units), *others)
    return learner


def build_statistics():
    learner = build_plain()
    torch.manual_seed(1)
    learner.heads = nn.ModuleList([PooledHead(), StatisticsHead(2), StatisticsHead(2)])
    return learner


def build_pyramid():
    return build(4, model=Pyramid())


def batch(step):
    """Images, of which number and size change, and their labels."""
    rng = torch.Generator().manual_seed(step)
    count, side = 4 - step % 2, 8 - step % 3
    return torch.randn(count, 2, side, side, generator=rng), LABELS[:count]


def updating(pipeline, optimizer):
    def backward(loss, module, complete):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return backward


def updating_late(pipeline, optimizer):
    """Negative control: with the gradients of the batch before."""
    kept = {}

    def backward(loss, module, complete):
        loss.backward()
        params = pipeline.learner.params(module)
        grads = [param.grad for param in params]
        for param, grad in zip(params, kept.get(module.index, grads), strict=True):
            param.grad = grad
        kept[module.index] = grads
        optimizer.step()
        optimizer.zero_grad()

    return backward


def train_batch(pipeline, step, backward=None):
    images, labels = batch(step)

    def run():
        return F.cross_entropy(pipeline.learner.model(images), labels)

    return pipeline.step(run, labels, backward)


def train_pipeline(builder, group=None, update=updating, **kwargs):
    pipeline = ModulePipeline(builder(), group=group, **kwargs)
    backward = update(pipeline, OPTIMIZERS['adamw'](pipeline.params()))
    for step in range(STEPS):
        train_batch(pipeline, step, backward)
    return pipeline.gather()


def train_alone(builder):
    learner = builder()
    optimizer = OPTIMIZERS['adamw'](all_params(learner))
    for step in range(STEPS):
        images, labels = batch(step)
        with learner.step(labels):
            loss = F.cross_entropy(learner.model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bank = learner.bank
    return dict(
        model=learner.model.state_dict(),
        heads=learner.heads.state_dict(),
        bank=None if bank is None else bank.state_dict(),
    )


@contextmanager
def replaced(cls, name, value):
    before = getattr(cls, name)
    setattr(cls, name, value(before))
    try:
        yield
    finally:
        setattr(cls, name, before)


def a_batch_late(receive):
    """Negative control: boundaries of the batch before, in the shape of this one."""
    kept = {}

    def late(self):
        packet = receive(self)
        now = packet['outputs']
        for name, map_ in list(now.items()):
            kept.setdefault(self, {}).setdefault(name, []).append(map_)
            old = kept[self][name][max(len(kept[self][name]) - 2, 0)]
            now[name] = torch.zeros_like(map_)
            n, h, w = (
                min(a, b)
                for a, b in zip(
                    (old.shape[0], *old.shape[2:]),
                    (map_.shape[0], *map_.shape[2:]),
                    strict=True,
                )
            )
            now[name][:n, :, :h, :w] = old[:n, :, :h, :w]
        return packet

    return late


def without_moments(receive):
    """Negative control: the long-term memory of maps from elsewhere stays empty."""

    def forgetful(self):
        return {**receive(self), 'moments': {}}

    return forgetful


def message_of(fn):
    try:
        fn()
    except (RuntimeError, ValueError) as error:
        return str(error)


def run(rank):
    """What each scenario gives on this rank."""
    # All before the first pipeline. Scenarios that fail leave messages behind, and so
    # have groups of their own.
    pair, ahead, channel = (dist.new_group(x) for x in ([1, 2], [0, 1], [0, 1]))
    skip = dist.new_group()
    short = timedelta(seconds=2)
    unread, silent = (dist.new_group([0, 1], timeout=short) for _ in range(2))
    results = {
        **run_results(rank, pair),
        'alive': run_one_step(),
        'ahead': run_ahead(rank, ahead),
        'channel': run_channel(rank, channel),
        'global skip': run_global_skip(skip),
        'too many': message_of(lambda: ModulePipeline(build(2, cuts=[]))),
        'tokens': message_of(lambda: ModulePipeline(build_tokens())),
    }
    dist.barrier()
    results['unread'] = run_unread(rank, unread)
    dist.barrier()
    results['silence'] = run_silence(rank, silent)
    dist.barrier()
    if rank < 2:  # rank 2 ends
        results['end'] = message_of(lambda: train_pipeline(build_plain))
    return results


def run_results(rank, pair):
    three = dict(builder=build_statistics, sizes=[1, 2, 1])
    results = {
        'plain': train_pipeline(build_plain),
        'statistics': train_pipeline(**three, in_flight=1),
        'pyramid': train_pipeline(build_pyramid),
        'late update': train_pipeline(build_plain, update=updating_late),
    }
    if rank > 0:
        results['two ranks'] = train_pipeline(build_plain, pair)
    for name, control in (('moments', without_moments), ('boundary', a_batch_late)):
        with replaced(Channel, 'receive', control):
            results[name] = train_pipeline(**three)
    return results


def run_one_step():
    pipeline = ModulePipeline(build_plain())
    learner = pipeline.learner
    optimizer = OPTIMIZERS['sgd'](pipeline.params())
    loss = train_batch(pipeline, 0, updating(pipeline, optimizer))
    pipeline.flush()
    return dict(
        modules=[p.numel() for p in learner.model.parameters()],
        heads=[p.numel() for p in learner.heads.parameters()],
        state=len(optimizer.state),
        own=len(pipeline.params()),
        loss=loss,
        sent=pipeline.sent_bytes,
    )


def run_ahead(rank, group):
    """When rank 0 ends each step, while rank 1 is not there for two seconds."""
    ends = {}
    for in_flight in (1, 3) if rank < 2 else ():
        dist.barrier(group)
        if rank == 1:
            time.sleep(2)
        start = time.monotonic()
        pipeline = ModulePipeline(build_plain(), in_flight=in_flight, group=group)
        times = ends[in_flight] = []
        for step in range(STEPS):
            train_batch(pipeline, step)
            times.append(time.monotonic() - start)
        pipeline.flush()
    return ends


def run_channel(rank, group):
    if rank == 2:
        return None
    channel = Channel(torch.device('cpu'), group)
    if rank == 1:
        return channel.receive()
    map_ = torch.arange(48.0).view(2, 2, 3, 4)
    last = map_.to(memory_format=torch.channels_last)
    half = map_[:, :, ::2].to(torch.bfloat16)
    channel.send(dict(a=dict(x=map_, y=map_), b=dict(x=last, z=half), c={}))
    channel.flush()
    return channel.sent_bytes


def run_global_skip(group):
    pipeline = ModulePipeline(build_global_skip(), group=group)
    images = torch.zeros(1, 2, 8, 8).double()
    return message_of(lambda: pipeline.step(lambda: pipeline.learner.model(images)))


def run_unread(rank, group):
    if rank == 2:
        return None
    return message_of(lambda: train_pipeline(build_pyramid, group, reads=[]))


def run_silence(rank, group):
    if rank > 0:
        time.sleep(4)
        return None
    return message_of(lambda: train_pipeline(build_plain, group))


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=60),
    )
    torch.save(run(rank), f'{folder}/{rank}.pth')
