"""The pipeline tool: its model of a pipeline, and one run in real processes."""

import json
import subprocess
import sys

import pytest
from scripts import run_script

from man_mm.benchmark import pipeline_costs as pipeline
from man_mm.parallel.prediction import Link, group_modules, predict_step

FREE = Link(0, float('inf'))
COMMAND = [sys.executable, '-W', 'ignore', 'tools/analysis_tools/benchmark_pipeline.py']
COMMAND += ['configs/man/resnet18_man_imagenet.py', '--size', '32', '32', '--batch']
COMMAND += ['2', '--modules', '3', '--devices', '2', '3', '--steps', '1']


def simulate(seconds, sizes, batches=50):
    """Seconds a batch of ranks that hand on packets, batch by batch."""
    starts = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    work = [sum(seconds[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    done = [0.0] * len(work)
    for _ in range(batches):
        arrived = 0.0
        for rank, duration in enumerate(work):
            done[rank] = arrived = max(done[rank], arrived) + duration
    return (done[-1] - sum(work)) / (batches - 1)


@pytest.mark.parametrize('sizes', [[4], [1, 3], [2, 2], [3, 1], [1, 1, 2], [1] * 4])
def test_a_step_is_that_of_the_slowest_rank(sizes):
    seconds = [1.0, 4.0, 2.0, 3.0]
    predicted = predict_step(seconds, sizes, [0] * 3, FREE)
    assert predicted == pytest.approx(simulate(seconds, sizes))


def test_a_rank_waits_for_the_packet_of_the_one_before():
    link = Link(latency=0.5, bandwidth=10)
    assert link.seconds(20) == 2.5
    assert predict_step([1.0, 3.0], [1, 1], [20], link) == 3 + 2.5
    assert predict_step([9.0, 3.0], [1, 1], [20], link) == 9


def test_busy_neighbours_slow_a_rank_down():
    assert predict_step([2.0, 2.0], [1, 1], [0], FREE, slowdown=1.5) == 3
    # The second rank is alone after the first one has waited.
    assert predict_step([1.0, 3.0], [1, 1], [0], FREE, slowdown=1.5) == 1.5 + 2
    assert predict_step([1.0, 1.0, 2.0], [1] * 3, [0, 0], FREE, 2.0) == 2 + 1


def test_modules_are_grouped_for_the_shortest_step():
    assert group_modules([1, 1, 1, 3], 2) == [3, 1]
    assert group_modules([3, 1, 1, 1], 3) == [1, 1, 2]
    assert group_modules([3, 1, 1, 1], 1) == [4]


def test_a_run_is_stored_and_shown(tmp_path):
    command = [*COMMAND, '--repeats', '1', '--out', str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'PREDICTED, not measured' in result.stdout
    (path,) = tmp_path.iterdir()
    assert path.name == 'resnet18_man_imagenet_32x32_b2_p2.json'
    record = json.loads(path.read_text())
    assert sum(record['sizes']) == len(record['module_seconds']) == 3
    # The packets that were sent are those that were counted, and their headers.
    counted = record['packet_bytes'][record['sizes'][0] - 1]
    assert counted < record['sent_bytes'][0] < counted + 4000
    assert [row['devices'] for row in record['predictions']] == [2, 3, 2, 3]
    records = pipeline.read_records(tmp_path)
    (row,) = pipeline.measured_rows(records)
    assert f'{record["speedups"]["cpu"][1]:.2f} (' in row
    assert len(pipeline.predicted_rows(records)) == 4
    assert '--batch 2 --modules 3 --processes 2 --steps 1' in record['command']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--processes', '1'], '--processes must be at least 2'),
        (['--modules', '2'], '--modules must be at least 3'),
        (['--repeats', '0'], '--repeats and --in-flight must be at least 1'),
        (['--bandwidth', '0'], '--bandwidth must be more than 0'),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(SystemExit, match=message):
        run_script('benchmark_pipeline', *COMMAND[4:], *options)
