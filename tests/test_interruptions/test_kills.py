"""A run killed many times, in saves as well, ends where an unkilled one does."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from killed_runs import attempt
from short_runs import differences, last_checkpoint

KILLS = 20
CALLS = 8  # of the file system that write two checkpoints


@pytest.fixture(scope='module')
def server():
    """Forks from a process that has imported everything."""
    context = multiprocessing.get_context('forkserver')
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests / 'helpers'), str(tests), os.getcwd()])
    with pytest.MonkeyPatch.context() as patch:
        old = os.environ.get('PYTHONPATH', '')
        patch.setenv('PYTHONPATH', paths + os.pathsep + old)
        context.set_forkserver_preload(['killed_runs'])
        yield context


def start(server, work_dir, **kwargs):
    pipe, end = server.Pipe(duplex=False)
    process = server.Process(target=attempt, args=(end, work_dir), kwargs=kwargs)
    process.start()
    end.close()
    return process, pipe


def finish(server, work_dir, **kwargs):
    """Trains to the end; returns what it ends with, and the time of an iteration."""
    process, pipe = start(server, work_dir, **kwargs)
    times = []
    while pipe.recv() != 'done':
        times.append(time.monotonic())
    process.join()
    assert process.exitcode == 0
    steps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return last_checkpoint(work_dir), sum(steps) / max(len(steps), 1)


def kill(server, work_dir, iterations, delay, call, **kwargs):
    """Kills a run some time after it began an iteration, or in a save."""
    process, pipe = start(server, work_dir, call=call, **kwargs)
    heard = []
    try:
        while len(heard) < iterations or call is not None:
            heard.append(pipe.recv())
            assert heard[-1] != 'done', 'the run was over before all kills'
        time.sleep(delay)
        process.kill()
    except EOFError:  # it died in a save
        pass
    process.join()
    assert process.exitcode == -9
    return heard[-1]


def kill_many(server, folder, kills, seed, **kwargs):
    rng = random.Random(seed)
    whole, step = finish(server, folder / 'whole', **kwargs)
    killed = folder / 'killed'
    killed.mkdir()
    in_saves = []
    for number in range(kills):
        call = rng.randint(1, CALLS) if number % 2 else None
        last = kill(
            server, killed, rng.randint(1, 2), rng.random() * step, call, **kwargs
        )
        in_saves += [last] if call is not None else []
    assert len(in_saves) == kills // 2
    assert all(said.startswith('killed in save') for said in in_saves)
    resumed, _ = finish(server, killed, **kwargs)
    assert differences(whole, resumed) == []
    assert not list(killed.glob('*.tmp'))
    return whole


def test_twenty_kills(server, tmp_path):
    whole = kill_many(server, tmp_path, KILLS, seed=0, epochs=10)
    control = tmp_path / 'control'
    kill(server, control, 4, 0, None, epochs=10)
    resumed, _ = finish(server, control, restore=False, epochs=10)
    assert differences(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 4))
@pytest.mark.parametrize('loop', [dict(epochs=34), dict(iters=100)])
def test_many_more_kills(server, tmp_path, seed, loop):
    kill_many(server, tmp_path, 60, seed, **loop)
