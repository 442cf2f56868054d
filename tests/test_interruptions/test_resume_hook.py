"""Resuming is bitwise with detectors of a config, and with restorers."""

import io

import pytest
import torch
from conftest import (
    RESTORERS,
    build_restorer,
    build_wrapper,
    detector_config,
    image_pairs,
    train_restorer,
)
from mmengine.config import Config
from mmengine.runner import Runner
from short_runs import differences, different, finish, train

from man_mm.datasets.make_digits import make_digits
from man_mm.interruptions import resume_hook


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('digits'), 12, 4, 64, 0)


def run(kind, digits, work_dir, stop=None, workers=0, **overrides):
    """Trains five iterations, or until it is stopped; resumes what was there."""
    cfg = Config.fromfile('configs/man/retinanet_r18_man_demo.py')
    if kind == 'faster_rcnn':
        small = detector_config(kind, 18)
        cfg.model = small.model
        cfg.model.backbone.norm_eval = False
        cfg.model.roi_head.bbox_head.num_classes = 10
    cfg.merge_from_dict(
        {
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': workers,
            'train_dataloader.persistent_workers': workers > 0,
            'train_dataloader.dataset.data_root': f'{digits}/',
            'val_dataloader.dataset.data_root': f'{digits}/',
            'val_dataloader.num_workers': 0,
            'val_dataloader.persistent_workers': False,
            'val_evaluator.ann_file': f'{digits}/annotations/instances_val.json',
            'train_cfg.max_iters': 5,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 1,
            'work_dir': str(work_dir),
            'resume': True,
            **overrides,
        }
    )
    cfg.pop('test_dataloader'), cfg.pop('test_cfg'), cfg.pop('test_evaluator')
    # Random augmentation makes the data depend on the random state.
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
    cfg.experiment_name = f'{work_dir.name}-{stop}-{kind}'
    return finish(Runner.from_cfg(cfg), stop)


@pytest.mark.parametrize(
    'kind, workers, stop',
    [('retinanet', 1, 2), ('faster_rcnn', 0, 3)],
)
def test_resume_is_bitwise(kind, workers, stop, digits, tmp_path):
    whole = run(kind, digits, tmp_path / 'whole', workers=workers)
    stopped = run(kind, digits, tmp_path / 'stopped', stop, workers=workers)
    resumed = run(kind, digits, tmp_path / 'stopped', workers=workers)
    assert differences(whole, resumed) == []
    assert different(whole['state_dict'], stopped['state_dict'])  # control
    assert 'moments' in whole['optimizer']['local_learning']['bank']


def test_control_without_seeds(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_hook, 'seed', lambda runner, iteration: None)
    whole = run('faster_rcnn', digits, tmp_path / 'whole')
    run('faster_rcnn', digits, tmp_path / 'stopped', 3)
    resumed = run('faster_rcnn', digits, tmp_path / 'stopped')
    assert different(whole['state_dict'], resumed['state_dict'])


def test_published_checkpoint_is_clean(digits, tmp_path):
    unsaved = {'default_hooks.checkpoint.save_optimizer': False}
    saved = run('retinanet', digits, tmp_path / 'run', **unsaved)
    assert 'optimizer' not in saved and 'man_mm' not in saved
    assert not any('aux' in key or 'heads' in key for key in saved['state_dict'])


def build(name):
    model = build_restorer(name)
    return model, build_wrapper(model, optimizer=dict(type='Adam', lr=1e-3))


def states(model, wrapper):
    return dict(model=model.state_dict(), wrapper=wrapper.state_dict())


@pytest.mark.parametrize('name', RESTORERS)
def test_restorers_resume_bitwise(name):
    model, wrapper = build(name)
    train_restorer(model, wrapper, 2)
    file = io.BytesIO()
    torch.save(states(model, wrapper), file)
    train_restorer(model, wrapper, 2, start=2)
    whole = states(model, wrapper)
    assert 'entry' in whole['wrapper']['local_learning']['bank']['moments']
    for control in (False, True):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, wrapper = build(name)
        model.load_state_dict(saved['model'])
        if not control:
            wrapper.load_state_dict(saved['wrapper'])
            assert different(saved, states(model, wrapper)) == []
        train_restorer(model, wrapper, 2, start=2)
        assert bool(different(whole, states(model, wrapper))) == control


def test_a_restorer_that_drops_paths_at_random(tmp_path):
    settings = dict(iters=4, custom_hooks=[], batch_of=image_pairs)
    whole = train(tmp_path / 'whole', model=build_restorer('swinir'), **settings)
    train(tmp_path / 'stopped', 2, model=build_restorer('swinir'), **settings)
    resumed = train(tmp_path / 'stopped', model=build_restorer('swinir'), **settings)
    assert differences(whole, resumed) == []
