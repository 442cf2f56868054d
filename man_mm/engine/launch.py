"""What a command line asks of a training or a test, written into the config."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .config_files import find_config, import_custom_modules

_AMP = {
    'OptimWrapper': 'AmpOptimWrapper',
    'LocalLearningOptimWrapper': 'AmpLocalLearningOptimWrapper',
}


def read_run_config(
    path: str | Path,
    work_dir: str | None = None,
    options: dict[str, Any] | None = None,
    launcher: str = 'none',
    local_rank: int = 0,
) -> Config:
    """Reads the config of a run.

    Args:
        path: Path of the config, as `find_config` takes it.
        work_dir: Folder of logs and checkpoints. Defaults to the config's, or else
            ``work_dirs/`` with the config's name.
        options: Settings that override the config. Defaults to None.
        launcher: How the processes are started. Defaults to ``'none'``.
        local_rank: Rank of this process on its machine, unless the environment says
            it. Defaults to 0.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    cfg = Config.fromfile(find_config(path))
    cfg.launcher = launcher
    cfg.merge_from_dict(options or {})
    import_custom_modules(cfg)
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)
    return cfg


def enable_amp(cfg: Config) -> None:
    """Turns on mixed precision, with a dynamic loss scale.

    Args:
        cfg: The config, which is changed.

    Raises:
        ValueError: If its optimizer wrapper has no mixed precision.
    """
    wrapper = cfg.optim_wrapper
    scope, dot, name = wrapper.get('type', 'OptimWrapper').rpartition('.')
    if name in _AMP.values():
        return
    if name not in _AMP:
        raise ValueError(
            f'--amp: optim_wrapper.type is {wrapper.type!r}, which has no mixed '
            f'precision; it has with {" or ".join(_AMP)}.'
        )
    wrapper.type = f'{scope}{dot}{_AMP[name]}'
    wrapper.loss_scale = 'dynamic'


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate by the batch size, as ``auto_scale_lr`` tells.

    Args:
        cfg: The config, which is changed.

    Raises:
        ValueError: If it does not tell the batch size that its rate is for.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise ValueError(
            '--auto-scale-lr: the config does not say which batch size its learning '
            'rate is for; set auto_scale_lr.base_batch_size.'
        )
    cfg.auto_scale_lr.enable = True


def resume_from(cfg: Config, checkpoint: str) -> None:
    """Resumes a training.

    Args:
        cfg: The config, which is changed.
        checkpoint: Path of the checkpoint; ``'auto'`` for the last one in the work
            dir, if there is any.
    """
    cfg.resume = True
    cfg.load_from = None if checkpoint == 'auto' else checkpoint


def show_predictions(
    cfg: Config, folder: str | None, window: bool, wait_time: float
) -> None:
    """Draws the predictions of a test, with mmdet's hook.

    Args:
        cfg: The config, which is changed.
        folder: Where drawings are stored, inside of the work dir; None for nowhere.
        window: Whether they are shown in a window.
        wait_time: Seconds that the window shows each.

    Raises:
        ValueError: If the config has no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization', {})
    if not hook.get('type', '').endswith('DetVisualizationHook'):
        raise ValueError(
            '--show and --show-dir need a DetVisualizationHook as '
            "default_hooks.visualization, as in mmdet's configs."
        )
    hook.draw = True
    if window:
        hook.show, hook.wait_time = True, wait_time
    if folder:
        hook.test_out_dir = folder


def enable_tta(cfg: Config) -> None:
    """Tests with augmentations, those of the config's ``tta_model`` and pipeline.

    Args:
        cfg: The config, which is changed.

    Raises:
        ValueError: If the config tells none.
    """
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
    if missing:
        raise ValueError(f'--tta: the config has no {" and no ".join(missing)}.')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def build_runner(cfg: Config) -> Runner:
    """Builds the runner, of the class that the config names if it names one.

    On a machine without a GPU, processes of ``--launcher pytorch`` are started here.
    """
    if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
        _start_cpu_ranks(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def _start_cpu_ranks(cfg: Config) -> None:
    """Connects the processes over gloo, and lets none of them ask for a GPU.

    mmengine selects a GPU for each process without asking whether there is one, unless
    they are connected already.
    """
    seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
            device_ids=None,
        )
