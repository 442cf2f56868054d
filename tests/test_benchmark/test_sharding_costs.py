"""The tool that measures what each process holds, in two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_hold_half_each(tmp_path):
    command = [
        Path(sys.executable).with_name('torchrun'),
        *(
            '--standalone',
            '--nproc_per_node',
            2,
            'tools/analysis_tools/measure_sharding.py',
        ),
        *('configs/man/resnet18_man_imagenet.py', '--size', 32, 32, '--batch', 2),
        *('--out', tmp_path),
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / 'resnet18_man_imagenet_k4_p2.json').read_text())
    copies, parts = record['rows']
    assert copies['wrapper'] == 'MMDistributedDataParallel'
    for kind in ('weights_bytes', 'optimizer_bytes'):
        assert 0.49 < parts[kind] / copies[kind] < 0.52
    assert (
        f'| 4 | ShardedModel | 2 | {parts["weights_bytes"] / 2**20:.1f}' in done.stdout
    )
    assert (
        'tools/analysis_tools/measure_sharding.py configs/man/resnet18'
        in record['command']
    )
