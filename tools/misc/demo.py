"""Train a detector end to end and by local learning on built-in images, and compare.

    mim run man_mm demo [--seed 0]

Makes the digits data set; measures memory and time of a step of end-to-end training,
of the strongest exact checkpointing, and of joint and local steps; trains a RetinaNet
end to end, by joint steps, by local ones, and by local ones that go over to joint ones;
and ends with a table, what it means, and pictures in ``work_dirs/demo``. Takes about
ten minutes on two CPU cores. A demo that was stopped goes on where it was.
"""

import argparse
import sys

from rich.console import Console

from man_mm.benchmark.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the trainings')
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        pictures = run_demo(args.seed, console)
    except RuntimeError as error:
        sys.exit(str(error))
    for path in pictures:
        console.print(path, highlight=False, markup=False)


if __name__ == '__main__':
    main()
