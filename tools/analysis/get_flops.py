#!/usr/bin/env python
"""Parameters and FLOPs of a model: python tools/analysis/get_flops.py CONFIG_OR_NAME"""

import argparse
import json
import logging
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmengine.logging import MMLogger

from mmvim._configs import merge_options
from mmvim.analysis import count_config
from mmvim.apis.model_zoo import load_config
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError

NOTE = (
    'MACs: multiply-accumulates of matrix products, convolutions, attention, and 3 per token, '
    'channel, state and direction of a scan;\nwhat papers call FLOPs. FLOPs: additions and '
    'multiplications, 9 for each of those of a scan, and norms.'
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Count parameters, MACs and FLOPs of a model.')
    parser.add_argument('model', nargs='+', help='paths of configs, or names of the model zoo')
    parser.add_argument(
        '--shape',
        nargs='+',
        metavar='SIDE|HxW',
        help="one or more input sizes: 224, 800x1216 (default: the model's own)",
    )
    parser.add_argument('--frames', type=int, help='frames of a video')
    parser.add_argument('--json', type=Path, metavar='FILE', help="write JSON ('-': print)")
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def parse_shape(text: str) -> tuple[int, int]:
    """Read 224 or 800x1216."""
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UserError(f'--shape must be like 224 or 800x1216, not {text!r}')
    return int(sides[0]), int(sides[-1])


def table(rows: list[dict]) -> str:
    """Lay the counts out for people."""
    lines = [f'{"model":<44} {"input":<12} {"params":>10} {"MACs":>10} {"FLOPs":>10}  MACs by kind']
    for row in rows:
        shape = 'x'.join(str(side) for side in row['input'][1:])
        kinds = ', '.join(
            f'{kind} {cost["macs"] / 1e9:.2f}'
            for kind, cost in row['by_kind'].items()
            if cost['macs']
        )
        lines.append(
            f'{row["model"]:<44} {shape:<12} {row["parameters"] / 1e6:>8.2f} M '
            f'{row["macs"] / 1e9:>8.2f} G {row["flops"] / 1e9:>8.2f} G  {kinds}'
        )
    return '\n'.join(lines)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        shapes = [parse_shape(text) for text in args.shape or ()] or [None]
        if args.frames is not None and args.frames < 1:
            raise UserError(f'--frames must be at least 1, not {args.frames}')
        if args.json and args.json.exists() and not args.overwrite:
            raise UserError(f'{str(args.json)!r} exists; --overwrite replaces it')
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        rows = []
        for model in args.model:
            try:
                cfg = load_config(model)
            except (ValueError, FileNotFoundError) as error:
                raise UserError(str(error)) from error
            merge_options(cfg, args.cfg_options)
            for shape in shapes:
                row = count_config(cfg, shape, frames=args.frames)
                name = Path(model).stem if model.endswith('.py') else model
                rows.append({'model': name, **row})
        if args.json and str(args.json) == '-':
            print(json.dumps(rows, indent=2))
            return
        print(f'{table(rows)}\n\n{NOTE}')
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    main()
