#!/usr/bin/env python
"""Curves and figures of training runs: python tools/analysis/analyze_logs.py WORK_DIR …"""

import argparse
import json
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.analysis import draw_runs, read_run
from mmvim.cli.analysis import complete_file
from mmvim.cli.diagnosis import reported_errors
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Summarise training runs, and compare them in a picture.'
    )
    parser.add_argument(
        'runs', nargs='+', help='work directories of tools/train.py, or scalars.json files'
    )
    parser.add_argument('--out', type=Path, metavar='PICTURE', help='draw the curves (png, pdf …)')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing picture')
    parser.add_argument(
        '--keys', nargs='+', metavar='KEY', help='what to draw (default: loss and all metrics)'
    )
    parser.add_argument('--smooth', type=int, default=1, metavar='N', help='mean over N entries')
    parser.add_argument('--json', action='store_true', help='print the figures as JSON')
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        if args.smooth < 1:
            raise UserError(f'--smooth must be at least 1, not {args.smooth}')
        if args.out and args.out.exists() and not args.overwrite:
            raise UserError(f'{str(args.out)!r} exists; --overwrite replaces it')
        try:
            runs = [read_run(path) for path in args.runs]
            if args.out:
                with complete_file(args.out) as path:
                    draw_runs(runs, path, args.keys, args.smooth)
        except (KeyError, ValueError, FileNotFoundError) as error:
            raise UserError(error.args[0]) from error
        summaries = [run.summary() for run in runs]
        if args.json:
            print(json.dumps(summaries, indent=2))
            return
        for summary in summaries:
            seconds, memory = summary['seconds_per_iteration'], summary['memory_mib']
            print(
                f'{summary["name"]}: {summary["iterations"]} iterations'
                + (f', {seconds:.3f} s each' if seconds else '')
                + (f', {memory} MiB' if memory else '')
                + f', last loss {summary["last_loss"]:.4f}'
            )
            for key, value in summary['metrics'].items():
                print(
                    f'  {key:<28} highest {value["highest"]:.4g} at {value["at_iteration"]}, '
                    f'last {value["last"]:.4g}'
                )
        if args.out:
            print(f'curves: {args.out}')


if __name__ == '__main__':
    main()
