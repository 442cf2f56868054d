"""Test a model: ``python tools/test.py CONFIG CHECKPOINT`` or ``mim test man_mm``.

Takes the arguments of mmdet's script.
"""

import argparse

from mmengine.config import DictAction
from mmengine.evaluator import DumpResults

from man_mm.engine import launch


def main() -> None:
    parser = argparse.ArgumentParser(description='Test a model')
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--work-dir',
        help='folder for logs; by default the one in the config, or work_dirs/ with '
        "the config's name",
    )
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='file to store the predictions in'
    )
    parser.add_argument(
        '--show', action='store_true', help='show the predictions in a window'
    )
    parser.add_argument('--show-dir', help='folder to draw the predictions to')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that --show waits for'
    )
    parser.add_argument('--tta', action='store_true', help='use test-time augmentation')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, such as test_dataloader.num_workers=0',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none'
    )
    # Passed by `torch.distributed.launch`, which `mim test --launcher pytorch` uses.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out}: name a .pkl file.')
    try:
        cfg = launch.read_run_config(
            args.config,
            args.work_dir,
            args.cfg_options,
            args.launcher,
            args.local_rank,
        )
        cfg.load_from = args.checkpoint
        if args.show or args.show_dir:
            launch.show_predictions(cfg, args.show_dir, args.show, args.wait_time)
        if args.tta:
            launch.enable_tta(cfg)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    runner = launch.build_runner(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    main()
