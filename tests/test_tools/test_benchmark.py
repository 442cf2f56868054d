import json
import subprocess
import sys


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
    assert all(len(row['seconds']) == 1 for row in record['results'].values())
    assert 'local learning' in done.stdout
