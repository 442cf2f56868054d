"""Train a model: ``python tools/train.py CONFIG`` or ``mim train man_mm CONFIG``.

Takes the arguments of mmdet's script. Local learning is in the config, or given by
``--cfg-options``.
"""

import argparse

from mmengine.config import DictAction

from man_mm.engine import launch


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a model')
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; by default the one in the config, '
        "or work_dirs/ with the config's name",
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the last one in '
        'the work dir',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, such as train_cfg.max_epochs=3',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none'
    )
    # Passed by `torch.distributed.launch`, which `mim train --launcher pytorch` uses.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)
    args = parser.parse_args()
    try:
        cfg = launch.read_run_config(
            args.config,
            args.work_dir,
            args.cfg_options,
            args.launcher,
            args.local_rank,
        )
        if args.amp:
            launch.enable_amp(cfg)
        if args.auto_scale_lr:
            launch.enable_auto_scale_lr(cfg)
        if args.resume is not None:
            launch.resume_from(cfg, args.resume)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    launch.build_runner(cfg).train()


if __name__ == '__main__':
    main()
