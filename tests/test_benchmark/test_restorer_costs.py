"""The benchmark on super-resolution models, which have a generator, not a backbone."""

import pytest
from mmengine.config import Config
from rich.console import Console

from man_mm.benchmark.scheme_costs import measure_schemes
from man_mm.engine.config_files import load_config

pytestmark = pytest.mark.usefixtures('mmagic')
CONFIG = 'configs/man/edsr_x2_man_photos.py'
SCHEMES = [
    'end-to-end',
    'end-to-end+checkpointing',
    'end-to-end+accumulate=2',
    'local',
    'local+recompute=generator.body',
    'local+micro=1',
]


def run(schemes):
    cfg = load_config(CONFIG, ['model.generator.mid_channels=8'])
    assert isinstance(cfg, Config)
    console = Console(quiet=True)
    return measure_schemes(cfg, (16, 16), 2, 1, schemes=schemes, console=console)


def test_schemes_save_memory_and_are_exact():
    rows = run(SCHEMES)
    base = rows['end-to-end']['peak']
    for name in SCHEMES[1:]:
        assert rows[name]['peak'] < base, name
        # Two images in two parts are rounded otherwise; losses are means over images.
        assert rows[name]['exactness'] < 1e-3, name
    references = {name: row['reference'] for name, row in rows.items()}
    assert references == {
        **dict.fromkeys(SCHEMES[:3], 'end-to-end'),
        **dict.fromkeys(SCHEMES[3:], 'local'),
    }
    assert set(rows['local']['modules']) >= {'stage 1', 'stage 4', 'upsampler'}
    assert rows['end-to-end+checkpointing']['flops'] > rows['end-to-end']['flops']


@pytest.mark.parametrize(
    ('scheme', 'word'),
    [
        ('local+checkpointing', 'use recompute=NAME,NAME'),
        ('end-to-end+efficient', 'needs a backbone with batch norms'),
    ],
)
def test_schemes_that_need_a_backbone(scheme, word):
    with pytest.raises(ValueError, match=word):
        run(['end-to-end', scheme])
