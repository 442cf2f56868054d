"""Several processes that train a module each equal one process, bit by bit."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import (
    WIDTH,
    equal,
)
from pipelines import (
    build_plain,
    build_pyramid,
    build_statistics,
    train_alone,
    train_pipeline,
    worker,
)

from man_mm.parallel import ModulePipeline

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pipeline')
    mp.start_processes(worker, (str(folder),), nprocs=3, start_method='fork')
    return [torch.load(folder / f'{rank}.pth') for rank in range(3)]


@pytest.mark.parametrize(
    ('name', 'builder'),
    [
        ('plain', build_plain),
        ('statistics', build_statistics),
        ('pyramid', build_pyramid),
    ],
)
def test_three_processes_equal_one(results, name, builder):
    alone = train_alone(builder)
    assert equal(results[0][name], alone)
    assert list(results[0][name]['model']) == list(alone['model'])
    assert results[1][name] is results[2][name] is None


def test_a_group_of_two_processes_equals_one(results):
    assert equal(results[1]['two ranks'], train_alone(build_plain))


@pytest.mark.parametrize(
    ('control', 'builder'),
    [
        ('late update', build_plain),
        ('moments', build_statistics),
        ('boundary', build_statistics),
    ],
)
def test_controls_differ(results, control, builder):
    assert not equal(results[0][control], train_alone(builder))


def test_every_parameter_lives_on_one_rank(results):
    alive = [result['alive'] for result in results]
    learner = build_plain()
    for part, module in (('modules', learner.model), ('heads', learner.heads)):
        sizes = zip(*(rank[part] for rank in alive), strict=True)
        whole = [p.numel() for p in module.parameters()]
        assert [sorted(size) for size in sizes] == [[0, 0, n] for n in whole]
    assert [rank['state'] for rank in alive] == [rank['own'] for rank in alive]
    assert alive[0]['loss'] is alive[1]['loss'] is None
    assert alive[2]['loss'] > 0
    assert alive[0]['sent'] > 4 * WIDTH * 8 * 8 * 4
    assert alive[2]['sent'] == 0


def test_a_map_that_was_not_sent_is_an_error(results):
    assert 'only an earlier rank of the pipeline has' in results[1]['unread']


def test_a_global_skip_is_refused_on_all_ranks(results):
    assert all('a pipeline sends none back' in r['global skip'] for r in results)


def test_units_on_tokens_are_refused_on_all_ranks(results):
    message = 'A pipeline needs units that take nothing but a map'
    assert all(message in result['tokens'] for result in results)


def test_a_rank_that_ended_is_an_error(results):
    assert 'Rank 2 did not take' in results[1]['end']
    assert 'Rank 1 did not take' in results[0]['end']


def test_a_rank_that_is_silent_is_an_error(results):
    assert 'Rank 1 did not take' in results[0]['silence']
    assert 'raise the timeout' in results[0]['silence']


def test_a_rank_runs_ahead_and_no_further_than_in_flight(results):
    ends = results[0]['ahead']
    assert ends[1][0] < 1.5 < ends[1][1]
    assert ends[3][2] < 1.5 < ends[3][3]


def test_a_channel_keeps_strides_and_sends_what_is_shared_once(results):
    sent, received = (result['channel'] for result in results[:2])
    map_ = torch.arange(48.0).view(2, 2, 3, 4)
    last = map_.to(memory_format=torch.channels_last)
    assert equal(received['a'], {'x': map_, 'y': map_})
    assert received['a']['x'].data_ptr() == received['a']['y'].data_ptr()
    assert equal(received['b'], {'x': last, 'z': map_[:, :, ::2].to(torch.bfloat16)})
    assert received['b']['x'].stride() == last.stride() != map_.stride()
    assert 2 * map_.nbytes < sent < 3 * map_.nbytes + 1000


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(sizes=[2, 2]), 'sizes must be 1 numbers of modules'),
        (dict(sizes=[3]), 'that sum to 4; got'),
        (dict(reads=['stage9']), r"reads has \['stage9'\]"),
        (dict(in_flight=0), 'in_flight must be at least 1'),
    ],
)
def test_bad_options_are_named(one_process, options, message):
    with pytest.raises(ValueError, match=message):
        ModulePipeline(build_plain(), **options)


def test_heads_that_follow_later_modules_are_refused(one_process):
    learner = build_plain()
    learner.heads[0].follow = lambda model: None
    with pytest.raises(ValueError, match='MomentumHead .* use other heads'):
        ModulePipeline(learner)


def test_one_process_is_a_pipeline_too(one_process):
    assert equal(train_pipeline(build_plain), train_alone(build_plain))


def test_more_processes_than_modules_are_an_error(results):
    message = '3 processes cannot share 1 modules: start at most 1 processes'
    assert all(message in result['too many'] for result in results)
