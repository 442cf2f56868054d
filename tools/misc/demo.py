"""Train a detector on built-in images: end to end, by joint and by local steps.

    mim run man_mm demo [--seed 0]

Makes the digits data set, trains the same RetinaNet in four ways with the stock
``mim train mmdet``, and ends with a table, a sentence that says what it means, and
pictures in ``work_dirs/demo``: the memory of a training step over time, the losses of
the modules, and detections. Takes some minutes on two CPU cores.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from man_mm.benchmark.demo import WORK_DIR, explain, make_table, run_demo


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the training runs')
    parser.add_argument('--out', type=Path, default=WORK_DIR / 'result.json')
    args = parser.parse_args()
    try:
        record, pictures = run_demo(args.seed)
    except (RuntimeError, OSError) as error:
        sys.exit(f'demo: {error}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + '\n')
    console = Console()
    console.print(make_table(record))
    console.print(explain(record))
    for path in (*pictures, args.out):
        console.print(path)


if __name__ == '__main__':
    main()
