"""Linear probes of the stages of trained networks."""

import json

import pytest
import torch
from mmengine.registry import MODELS
from scripts import run_script

from man_mm.benchmark import stage_probes as tool

STAGES = [f'backbone.layer{stage}' for stage in (1, 2, 3, 4)]
DETECTOR = 'configs/end_to_end/retinanet_r18_demo.py'


@pytest.fixture
def detector(tmp_path):
    """A config of digits, of which every image is enlarged, and a model of it."""
    from man_mm.datasets.make_digits import make_digits

    cfg = tool.load_config(DETECTOR)
    out = make_digits(tmp_path / 'digits', num_train=1, num_val=12, size=64)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = f'{out}/'
    (resize,) = [
        step for step in cfg.val_dataloader.dataset.pipeline if step.type == 'Resize'
    ]
    resize.scale = (128, 128)
    torch.manual_seed(0)
    return cfg, MODELS.build(cfg.model).eval()


def test_features_are_averages_over_the_boxes(detector):
    cfg, model = detector
    seen, boxes = [], []
    model.backbone.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    features, labels, images = tool.read_features(cfg, model, count=2)
    names = list(features)
    assert [name.rpartition('.')[0] for name in names] == STAGES
    assert len(labels) == len(images) == len(features[names[0]])
    assert images.unique().tolist() == list(range(int(images.max()) + 1))
    assert seen[-1].shape[-2:] == (128, 128)

    notes = json.loads(
        (
            tool.Path(cfg.val_dataloader.dataset.data_root)
            / 'annotations'
            / 'instances_val.json'
        ).read_text()
    )['annotations']
    boxes = [note['bbox'] for note in notes if note['image_id'] == 1]
    assert (images == 0).sum() == len(boxes)
    maps = {}
    layer = model.get_submodule(names[0])
    layer.register_forward_hook(lambda _m, _args, out: maps.update(first=out))
    with torch.no_grad():
        model.backbone(seen[-1])
    stride = 128 // maps['first'].shape[-1]
    for row, (x, y, w, h) in zip(features[names[0]], boxes, strict=False):
        left, top = int(2 * x / stride), int(2 * y / stride)  # enlarged twice
        right, bottom = -int(-2 * (x + w) // stride), -int(-2 * (y + h) // stride)
        inside = maps['first'][0, :, top:bottom, left:right]
        low, high = inside.amin((1, 2)), inside.amax((1, 2))
        assert ((row >= low - 1e-4) & (row <= high + 1e-4)).all()


def test_probes_tell_features_from_noise():
    torch.manual_seed(0)
    images = torch.arange(400)
    labels = images // 2 % 4
    features = dict(
        classes=torch.eye(4)[labels] + 0.1 * torch.randn(400, 4),
        noise=torch.randn(400, 4),
    )
    accuracies = tool.fit_probes(features, labels, images)
    assert accuracies['classes'] > 95
    assert accuracies['noise'] < 40  # control
    with pytest.raises(ValueError, match='too few images'):
        tool.fit_probes(features, labels, images * 2)


def test_the_command_line_writes_results(detector, tmp_path, monkeypatch, capsys):
    cfg, model = detector
    checkpoint, out = tmp_path / 'x.pth', tmp_path / 'out'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    monkeypatch.setattr(tool, 'load_config', lambda _path, _options: cfg)
    run_script('probe_stages', DETECTOR, f'a model={checkpoint}', '--out', out)
    (result,) = tool.read_folder(out)
    assert [*result['accuracies']] == [*tool.read_features(cfg, model, 1)[0]]
    assert all(0 <= value <= 100 for value in result['accuracies'].values())
    assert 'a model' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_script('probe_stages', DETECTOR, 'a model=no_such.pth')


def test_classifiers_are_built_as_their_runner_does():
    from mmpretrain.structures import DataSample

    cfg = tool.load_config('configs/end_to_end/resnet32_fashion.py')
    assert tool.whole_model(cfg)['data_preprocessor']['mean'] == [72.94]
    cfg = tool.load_config(DETECTOR)
    own = cfg.model.data_preprocessor
    assert tool.whole_model(cfg)['data_preprocessor'] == own
    boxes, labels = tool.objects_of([DataSample().set_gt_label(3)])
    assert boxes is None and [x.tolist() for x in labels] == [[3]]
