r"""The leaderboard: ``mim run man_mm leaderboard {add,validate,build,check}``.

    mim run man_mm leaderboard add benchmarks/results/retinanet_r50_man_coco_608x972_b1
    mim run man_mm leaderboard add my_reported_entry.json
    mim run man_mm leaderboard add        # all measured entries again
    mim run man_mm leaderboard build      # documents and metafiles

Entries are files ``benchmarks/results/<task>/<id>.json``, see docs/leaderboard.md.
Run it in the root of a clone of man_mm, or give that as --root.
"""

import argparse
import json
import sys
from pathlib import Path

from man_mm.leaderboard.board import add, build, check, validate
from man_mm.leaderboard.entries import EntryError, read_entries
from man_mm.leaderboard.tables import TableError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--root',
        type=Path,
        default=Path('.'),
        help=(
            'clone of man_mm whose benchmarks folder has the entries; '
            'default: the current folder'
        ),
    )
    commands = parser.add_subparsers(dest='command', required=True)
    adding = commands.add_parser('add', help='make entries from result files')
    adding.add_argument('results', nargs='*', type=Path, metavar='RESULT')
    adding.add_argument(
        '--set',
        nargs='+',
        default=[],
        type=parse_word,
        metavar='KEY=VALUE',
        help='fields that the result files lack, such as model=ResNet-50',
    )
    adding.add_argument(
        '--without-times',
        action='store_true',
        help='omit times, because other work ran at the same time',
    )
    commands.add_parser('validate', help='check the entries')
    commands.add_parser('build', help="write the documents' tables and the metafiles")
    commands.add_parser('check', help='check entries, documents and metafiles')
    args = parser.parse_args()
    if not (args.root / 'benchmarks').is_dir():
        parser.error(
            f'there is no benchmarks/ in {args.root.resolve()}: the leaderboard is '
            'part of a clone of man_mm; run this in its root, or give that as --root.'
        )
    return args


def parse_word(text: str) -> tuple[str, object]:
    """Reads ``KEY=VALUE``, of which the value may be JSON."""
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r}: write KEY=VALUE.')
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    args = parse_args()
    try:
        if args.command == 'add':
            written = add(
                args.results, args.root, dict(args.set), not args.without_times
            )
            print('\n'.join(map(str, written)))
            print(f'{len(written)} entries; now: mim run man_mm leaderboard build')
        elif args.command == 'build':
            for path in build(args.root):
                print(path)
        else:
            errors = (validate if args.command == 'validate' else check)(args.root)
            if errors:
                sys.exit('\n'.join(errors))
            print(f'{len(read_entries(args.root))} entries: no error')
    except (EntryError, TableError) as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main()
