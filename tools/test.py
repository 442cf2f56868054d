"""Test a model: ``python tools/test.py CONFIG CHECKPOINT`` or ``mim test man_mm``."""

from man_mm.engine.launch import build_runner, load_config, make_parser


def main() -> None:
    """Run the test that the command line asks for."""
    parser = make_parser('Test a model')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    args = parser.parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    build_runner(cfg).test()


if __name__ == '__main__':
    main()
