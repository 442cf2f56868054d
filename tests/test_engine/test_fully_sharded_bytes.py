"""What a process keeps and sends when a model is split: a table of docs/distributed.md.

``python tests/test_engine/test_fully_sharded_bytes.py`` writes it into the document.
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'helpers'))
from conftest import build_classifier, build_wrapper, labelled_images
from documents import read_marked, write_marked
from mmengine.model import MMDistributedDataParallel
from test_distributed import in_processes, share

from man_mm import FullyShardedModel
from man_mm.engine.distributed import is_sharded

DOCUMENT = Path(__file__).parents[2] / 'docs/distributed.md'
START, END = '<!-- bytes -->', '<!-- end of bytes -->'
KINDS = {
    'data parallel': partial(MMDistributedDataParallel, broadcast_buffers=False),
    'sharded': FullyShardedModel,
    'sharded, exact steps': FullyShardedModel,
    '`shard_size=2`': partial(FullyShardedModel, shard_size=2),
}
OPTIONS = {'sharded, exact steps': dict(end_to_end_from=0)}
WORLDS = {1: list(KINDS)[:2], 2: list(KINDS)[:3], 4: list(KINDS)}
KEPT = ('weights', 'gradients', 'optimizer state')
# Each collective operation by what it does to the bytes of its largest tensor.
COLLECTIVES = {
    'all_reduce': 'averaged',
    'all_gather_into_tensor': 'gathered',
    'all_gather_single': 'gathered',
    'reduce_scatter_tensor': 'reduced',
    'reduce_scatter_single': 'reduced',
}
SENT = dict.fromkeys(COLLECTIVES.values())


@pytest.fixture(scope='module', autouse=True)
def imported():
    """Training once imports what each forked process would import by itself."""
    model = build_classifier(18)
    model.train_step(labelled_images(8, 32), build_wrapper(model))


def local_bytes(tensors):
    """Bytes of the storages behind a process's parts."""
    parts = [t.to_local() if is_sharded(t) else t for t in tensors]
    storages = {part.untyped_storage().data_ptr(): part for part in parts}
    return sum(part.untyped_storage().nbytes() for part in storages.values())


def spy_on_messages():
    """A list of what is sent from now on: what is done to it, and its bytes."""
    messages = []

    def spied(function, what, *args, **kwargs):
        tensors = filter(torch.is_tensor, (*args, *kwargs.values()))
        # Some versions of torch call them for a process alone, which sends nothing.
        if torch.distributed.get_world_size(kwargs.get('group')) > 1:
            messages.append((what, max(tensor.nbytes for tensor in tensors)))
        return function(*args, **kwargs)

    for name, what in COLLECTIVES.items():
        if function := getattr(torch.distributed, name, None):
            setattr(torch.distributed, name, partial(spied, function, what))
    return messages


def count_bytes(kind, batch, messages):
    """Bytes of what is kept between steps, and of what a step sends."""
    model = build_classifier(18)
    wrapped = KINDS[kind](model)
    adam = dict(type='AdamW', lr=1e-3)
    options = OPTIONS.get(kind, {})
    wrapper = build_wrapper(wrapped, update='iteration', optimizer=adam, **options)
    optimizer, counts = wrapper.optimizer, {}

    def count(*_):
        params = [p for group in optimizer.param_groups for p in group['params']]
        counts['gradients'] = local_bytes([p.grad for p in params])

    optimizer.register_step_pre_hook(count)
    messages.clear()
    wrapped.train_step(batch, wrapper)
    counts.update({what: sum(n for w, n in messages if w == what) for what in SENT})
    counts['at a time'] = max([n for w, n in messages if w == 'gathered'], default=0)
    heads = wrapper.learner.heads.parameters()
    counts['weights'] = local_bytes([*model.parameters(), *heads])
    states = [v for state in optimizer.state.values() for v in state.values()]
    counts['optimizer state'] = local_bytes(states)
    last = wrapper.learner.modules[-1]
    counts['last module'] = sum(param.numel() * 4 for param in last.params)
    return counts


def count_both(rank, world):
    messages = spy_on_messages()
    batch = share(labelled_images(8, 32), rank, world)
    return {kind: count_bytes(kind, batch, messages) for kind in WORLDS[world]}


def measure(folder):
    return {world: in_processes(count_both, folder, world) for world in WORLDS}


def table(ranks):
    columns = (*KEPT, *SENT, 'at a time')
    lines = [
        '| processes | | weights | gradients | optimizer state | gradients averaged '
        '| weights gathered | gradients reduced | most gathered at a time |',
        '|---' * 9 + '|',
    ]
    for world in WORLDS:
        for kind, counts in ranks[world][0].items():
            cells = [f'{counts[name] / 1e3:,.0f}' for name in columns]
            lines.append(f'| {world} | {kind} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def test_a_process_keeps_its_part_and_sends_each_value_once(tmp_path):
    ranks = measure(tmp_path)
    for world in WORLDS:
        for rank in ranks[world]:
            copied, sharded = rank['data parallel'], rank['sharded']
            whole = copied['weights']
            for kind, parts in (('sharded', world), ('`shard_size=2`', 2)):
                for name in KEPT if kind in rank else ():
                    part = copied[name] / parts
                    assert rank[kind][name] == pytest.approx(part, rel=0.05), name
            sent = whole if world > 1 else 0
            # Each weight is gathered once, each gradient is reduced once.
            for name in ('gathered', 'reduced'):
                assert sharded[name] == pytest.approx(sent, rel=0.02), name
            assert copied['averaged'] == pytest.approx(sent, rel=0.02)
            assert sharded['averaged'] < 1000  # long-term memory
            if exact := rank.get('sharded, exact steps'):
                # Modules run twice, and the last one, with the head, does not.
                own = world * exact['weights']
                sent = 2 * own - exact['last module']
                assert exact['gathered'] == pytest.approx(sent, rel=0.02)
                assert exact['reduced'] == pytest.approx(own, rel=0.02)
                assert exact['at a time'] == sharded['at a time']
            if world == 4:  # two copies average their parts
                averaged = rank['`shard_size=2`']['averaged']
                assert averaged == pytest.approx(whole / 2, rel=0.02)
    assert read_marked(DOCUMENT, START, END) == table(ranks)


def follow_weights(rank, world):
    """Modules that have their weights while each runs."""
    model = build_classifier(18)
    wrapped = FullyShardedModel(model)
    wrapper = build_wrapper(wrapped)
    seen = []
    starts = [model.get_submodule(m.parts[0]) for m in wrapper.learner.modules]

    def look(*_):
        seen.append([not is_sharded(next(start.parameters())) for start in starts])

    for start in starts:
        start.register_forward_pre_hook(look)
    model.head.register_forward_pre_hook(look)
    batch = share(labelled_images(8, 32), rank, world)
    wrapped.train_step(batch, wrapper)
    trained = list(seen)
    seen.clear()
    with torch.no_grad():
        wrapped.eval().val_step(batch)
    params = [*model.parameters(), *wrapper.learner.heads.parameters()]
    assert all(map(is_sharded, params))
    return trained, seen


def test_one_module_has_its_weights(tmp_path):
    only = [[i == j for i in range(4)] for j in range(4)]
    for trained, predicted in in_processes(follow_weights, tmp_path, 2):
        assert trained == [*only, only[-1]]  # at the model's own head the last has
        assert predicted == [*only, [False] * 4]


if __name__ == '__main__':
    build_wrapper(build_classifier(18))  # what is imported before a fork is shared
    with TemporaryDirectory() as folder:
        rows = table(measure(folder))
    write_marked(DOCUMENT, START, END, rows)
