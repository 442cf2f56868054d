import json
import subprocess
import sys

import pytest
from mmengine.config import Config


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend('tools')
    import benchmark

    return benchmark


def test_schemes_do_not_touch_each_other(benchmark):
    cfg = Config.fromfile('configs/man/retinanet_r18_man_demo.py')
    before = cfg.pretty_text
    built = {name: benchmark.scheme_config(cfg, name) for name in benchmark.SCHEMES}
    assert cfg.pretty_text == built['local learning'].pretty_text == before
    assert built['checkpointing'].model.backbone.with_cp
    assert 'with_cp' not in built['end-to-end'].model.backbone
    for name in ('end-to-end', 'checkpointing'):
        assert built[name].optim_wrapper.type == 'OptimWrapper'
        assert built[name].optim_wrapper.optimizer == cfg.optim_wrapper.optimizer


def test_benchmark_compares_the_schemes(tmp_path):
    out = tmp_path / 'result.json'
    command = [sys.executable, 'tools/benchmark.py']
    command += ['configs/man/retinanet_r18_man_demo.py', '--size', '256', '256']
    command += ['--repeats', '1', '--out', str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    peaks = {name: row['peak'] for name, row in record['results'].items()}
    assert set(peaks) == {'end-to-end', 'checkpointing', 'local learning'}
    assert peaks['local learning'] < peaks['end-to-end']
    assert len(set(peaks.values())) == 3
    assert all(len(row['seconds']) == 1 for row in record['results'].values())
    assert 'local learning' in done.stdout
