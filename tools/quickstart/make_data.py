#!/usr/bin/env python
"""Make the quickstart data: python tools/quickstart/make_data.py all"""

import argparse
import sys
import time
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.datasets.quickstart import TASKS, QuickstartDataError, prepare


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Write handwritten digits, alone (cls), on photographs (det, seg) or moving '
        '(video), in the formats that mmpretrain, mmdet, mmseg and mmvim load. Nothing is '
        'downloaded; data that is already complete is left alone.'
    )
    parser.add_argument('task', choices=[*TASKS, 'all'])
    parser.add_argument(
        '--out', default='data/quickstart', help='root folder (default: %(default)s)'
    )
    parser.add_argument('--force', action='store_true', help='make the data again')
    return parser.parse_args()


class Progress:
    """One line that is rewritten on a terminal; a line per quarter elsewhere."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.live = sys.stdout.isatty()
        self.shown = -1

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        step = done * (100 if self.live else 4) // total
        if step == self.shown:
            return
        self.shown = step
        end = '\r' if self.live and done < total else '\n'
        print(f'{self.task}: {done:5d} / {total} files', end=end, flush=True)


def main() -> int:
    """Run the tool."""
    args = parse_args()
    for task in TASKS if args.task == 'all' else [args.task]:
        start = time.perf_counter()
        try:
            made = prepare(task, args.out, progress=Progress(task), force=args.force)
        except QuickstartDataError as error:
            print(f'make_data: {error}', file=sys.stderr)
            return 1
        if made:
            print(f'{task}: wrote {args.out}/{task} in {time.perf_counter() - start:.0f} s')
        else:
            print(f'{task}: {args.out}/{task} is complete')
    return 0


if __name__ == '__main__':
    sys.exit(main())
