"""Arguments of train.py and test.py, as they change a config."""

import sys

import pytest
from conftest import LOCAL_LEARNING, build_cifar_classifier
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from man_mm import AmpLocalLearningOptimWrapper, LocalLearningOptimWrapper
from man_mm.engine import launch

SGD = dict(type='SGD', lr=0.1)


@pytest.mark.parametrize('scope', ['', 'man_mm.'])
def test_amp_of_local_learning(scope):
    wrapper = {key: scope + name for key, name in LOCAL_LEARNING.items()}
    cfg = Config(dict(optim_wrapper=dict(wrapper, optimizer=SGD)))
    model = build_cifar_classifier()
    plain = build_optim_wrapper(model, cfg.optim_wrapper.copy())
    assert type(plain) is LocalLearningOptimWrapper  # control
    launch.enable_amp(cfg)
    once = cfg.optim_wrapper.copy()
    launch.enable_amp(cfg)
    assert cfg.optim_wrapper == once
    built = build_optim_wrapper(build_cifar_classifier(), cfg.optim_wrapper)
    assert type(built) is AmpLocalLearningOptimWrapper
    assert len(built.scalers) == len(built.learner.modules) > 1


def test_custom_imports_of_options_are_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')  # which it sets for good
    (tmp_path / 'parts_of_a_user.py').write_text('')
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['man_mm'])")
    launch.read_run_config(config)
    assert 'parts_of_a_user' not in sys.modules  # control
    options = {'custom_imports.imports': ['man_mm', 'parts_of_a_user']}
    launch.read_run_config(config, options=options)
    assert 'parts_of_a_user' in sys.modules


def test_amp_of_other_wrappers():
    cfg = Config(dict(optim_wrapper=dict(optimizer=SGD)))
    launch.enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    cfg = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper', optimizer=SGD)))
    with pytest.raises(ValueError, match=r"optim_wrapper\.type is 'ApexOptimWrapper'"):
        launch.enable_amp(cfg)


def test_auto_scale_lr():
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16, enable=False)))
    launch.enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable
    for bad in (dict(), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(ValueError, match=r'set auto_scale_lr\.base_batch_size'):
            launch.enable_auto_scale_lr(Config(bad))


def test_predictions_are_drawn_by_the_hook_of_mmdet():
    hooks = dict(visualization=dict(type='DetVisualizationHook'))
    cfg = Config(dict(default_hooks=hooks))
    launch.show_predictions(cfg, 'drawn', True, 3)
    assert dict(cfg.default_hooks.visualization) == dict(
        type='DetVisualizationHook',
        draw=True,
        show=True,
        wait_time=3,
        test_out_dir='drawn',
    )
    with pytest.raises(ValueError, match=r'default_hooks\.visualization'):
        launch.show_predictions(Config({}), None, True, 3)


def test_tta_needs_what_the_config_says_of_it():
    loader = dict(dataset=dict(pipeline=[dict(type='Plain')]))
    cfg = Config(
        dict(
            model=dict(type='Net'),
            test_dataloader=loader,
            tta_model=dict(type='TTA'),
            tta_pipeline=[dict(type='Flips')],
        )
    )
    launch.enable_tta(cfg)
    assert cfg.model == dict(type='TTA', module=dict(type='Net'))
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='Flips')]
    with pytest.raises(ValueError, match='no tta_model and no tta_pipeline'):
        launch.enable_tta(Config(dict(model=dict(type='Net'))))
