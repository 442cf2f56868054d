"""A resumed run ends bitwise where an uninterrupted one ends, with real runners."""

import io

import pytest
import torch
from conftest import (
    LOCAL_LEARNING,
    RESTORERS,
    build_restorer,
    build_wrapper,
    detector_config,
    image_pairs,
    train_restorer,
)
from mmengine.config import Config
from mmengine.runner import Runner

from man_mm.datasets.make_digits import make_digits

ITERS = 5
ADAM = dict(type='Adam', lr=1e-3)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('digits'), 12, 4, 64, 0)


def run(kind, digits, work_dir, iters=ITERS, workers=0, **overrides):
    """Trains some iterations of a short run, resuming what the work dir holds."""
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
            'train_cfg.max_iters': ITERS,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 1,
            'default_hooks.checkpoint.max_keep_ckpts': 20,
            'work_dir': str(work_dir),
            'resume': True,
            'default_hooks.logger.interval': 1,
            **overrides,
        }
    )
    cfg.pop('test_dataloader'), cfg.pop('test_cfg'), cfg.pop('test_evaluator')
    # Random augmentation makes the data depend on the random state.
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='RandomFlip', prob=0.5))
    cfg.experiment_name = f'{work_dir.name}-{iters}-{kind}'
    runner = Runner.from_cfg(cfg)
    if iters < ITERS:  # stop in the middle, as an interruption would
        runner.train_loop.stop_training = False
        run_iter = runner.train_loop.run_iter

        def stop(batch):
            run_iter(batch)
            runner.train_loop.stop_training = runner.train_loop.iter >= iters

        runner.train_loop.run_iter = stop
    runner.train()
    return torch.load(work_dir / f'iter_{iters}.pth', weights_only=True)


def equal(a, b, path=''):
    """Names of the entries in which two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a for d in equal(a[k], b[k], f'{path}.{k}')]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True))
                for d in equal(x, y, f'{path}.{i}')]  # fmt: skip
    return [] if a == b else [path]


KEYS = ('state_dict', 'optimizer', 'man_mm', 'param_schedulers')


@pytest.mark.parametrize(
    'kind, workers, stop',
    [('retinanet', 0, 1), ('retinanet', 1, 2), ('faster_rcnn', 0, 3)],
)
def test_resume_is_bitwise(kind, workers, stop, digits, tmp_path):
    whole = run(kind, digits, tmp_path / 'whole', workers=workers)
    first = run(kind, digits, tmp_path / 'stopped', iters=stop, workers=workers)
    resumed = run(kind, digits, tmp_path / 'stopped', workers=workers)
    for key in KEYS:
        assert equal(whole[key], resumed[key]) == []
    assert equal(whole['state_dict'], first['state_dict'])  # control
    assert 'moments' in whole['optimizer']['local_learning']['bank']


def test_control_without_random_state(digits, tmp_path, monkeypatch):
    from man_mm import ResumeHook

    whole = run('faster_rcnn', digits, tmp_path / 'whole')
    run('faster_rcnn', digits, tmp_path / 'stopped', iters=3)
    monkeypatch.setattr(
        ResumeHook, 'after_load_checkpoint', lambda *args, **kwargs: None
    )
    resumed = run('faster_rcnn', digits, tmp_path / 'stopped')
    assert equal(whole['state_dict'], resumed['state_dict'])


def test_published_checkpoint_is_clean(digits, tmp_path):
    saved = run(
        'retinanet', digits, tmp_path / 'run',
        **{'default_hooks.checkpoint.save_optimizer': False},
    )  # fmt: skip
    assert 'optimizer' not in saved and 'man_mm' not in saved
    assert not any('aux' in key or 'heads' in key for key in saved['state_dict'])


class TestRestorers:
    """The same for mmagic, with the states of model and wrapper, and with a runner."""

    @staticmethod
    def build(name):
        model = build_restorer(name)
        return model, build_wrapper(model, optimizer=dict(ADAM))

    @staticmethod
    def states(model, wrapper):
        return dict(model=model.state_dict(), wrapper=wrapper.state_dict())

    @pytest.mark.parametrize('name', RESTORERS)
    def test_resume_is_bitwise(self, name):
        model, wrapper = self.build(name)
        train_restorer(model, wrapper, 2)
        file = io.BytesIO()
        torch.save(self.states(model, wrapper), file)
        train_restorer(model, wrapper, 2, start=2)
        whole = self.states(model, wrapper)
        assert 'entry' in whole['wrapper']['local_learning']['bank']['moments']

        for control in (False, True):
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model, wrapper = self.build(name)
            model.load_state_dict(saved['model'])
            if not control:
                wrapper.load_state_dict(saved['wrapper'])
                assert equal(saved, self.states(model, wrapper)) == []
            train_restorer(model, wrapper, 2, start=2)
            resumed = self.states(model, wrapper)
            if control:
                assert equal(whole['model'], resumed['model'])
            else:
                assert equal(whole, resumed) == []

    @staticmethod
    def run(work_dir, iters):
        """A real runner, which resumes what is in the work dir."""
        pairs = image_pairs(size=6)
        pairs = zip(pairs['inputs'], pairs['data_samples'], strict=True)
        runner = Runner(
            build_restorer('swinir'),  # which drops paths at random
            str(work_dir),
            train_dataloader=dict(
                batch_size=2,
                sampler=dict(type='InfiniteSampler', shuffle=True),
                dataset=[dict(inputs=x, data_samples=y) for x, y in pairs],
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
            optim_wrapper=dict(LOCAL_LEARNING, optimizer=dict(ADAM)),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False),
                memory_bank=dict(type='MemoryBankHook'),
            ),
            default_scope='mmagic',
            randomness=dict(seed=0),
            resume=True,
            experiment_name=f'{work_dir.name}-{iters}',
            log_level='WARNING',
        )
        runner.train()
        return torch.load(work_dir / f'iter_{iters}.pth', weights_only=True)

    def test_a_resumed_runner(self, tmp_path):
        whole = self.run(tmp_path / 'whole', 4)
        stopped = self.run(tmp_path / 'stopped', 2)
        resumed = self.run(tmp_path / 'stopped', 4)
        for key in ('state_dict', 'optimizer', 'man_mm'):
            assert equal(whole[key], resumed[key]) == []
            assert key == 'man_mm' or equal(whole[key], stopped[key])  # control
