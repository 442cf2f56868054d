"""Train a model: ``python tools/train.py CONFIG`` or ``mim train man_mm CONFIG``."""

from man_mm.engine.launch import build_runner, load_config, make_parser


def main() -> None:
    """Run the training that the command line asks for."""
    parser = make_parser('Train a model')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the last one in '
        'the work dir',
    )
    args = parser.parse_args()
    cfg = load_config(args)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    build_runner(cfg).train()


if __name__ == '__main__':
    main()
