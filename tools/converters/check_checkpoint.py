#!/usr/bin/env python
"""Say whether a checkpoint belongs to a model: python tools/converters/check_checkpoint.py …"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from mmengine.logging import MMLogger

from mmvim.apis import LoadReport, build_model, compare_weights, load_config, model_info
from mmvim.checkpoints.files import describe, read_checkpoint
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.compat.mmengine_checkpoints import hash_in_name, sha256
from mmvim.errors import CheckpointError, UserError

MISFIT = 1
SHOWN = 10


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Compare a checkpoint with the model of a config, name by name and shape by '
        'shape, and say how it is wrapped and what differs. Nothing is written, and the model '
        'takes no memory. Exit status: 0 if the file fits, 1 if not, 2 if it cannot be read.'
    )
    parser.add_argument('model', help='a name of the model zoo, or the path of a config')
    parser.add_argument('checkpoint', help="file or URL, or 'zoo' for the authors' weights")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--ema', action='store_true', help='take the averaged weights')
    weights.add_argument('--no-ema', action='store_true', help='take the trained weights')
    parser.add_argument('--all', action='store_true', help='list every name, also renamed ones')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def describe_file(file: str) -> list[str]:
    """Size and SHA-256 of a local file, which must be the one in its name, if there is one."""
    path = Path(file)
    if not path.is_file():
        return []
    digest, expected = sha256(path), hash_in_name(path.name)
    lines = [f'size: {path.stat().st_size} bytes', f'sha256: {digest}']
    if expected is not None and not digest.startswith(expected):
        raise CheckpointError(
            f'checkpoint {file!r} is damaged: its sha256 begins with {digest[: len(expected)]}, '
            f'and its name says {expected}'
        )
    return lines


def listed(title: str, names: Sequence[str], everything: bool) -> list[str]:
    """A heading with the number of names, and the names."""
    if not names:
        return []
    shown = names if everything else names[:SHOWN]
    rest = [f'  … and {len(names) - len(shown)} more (--all)'] if len(names) > len(shown) else []
    return [f'{title}: {len(names)}', *(f'  {name}' for name in shown), *rest]


def check(args: argparse.Namespace) -> bool:
    """Print the comparison; return whether the checkpoint fits."""
    cfg = load_config(args.model)
    cfg.merge_from_dict(args.cfg_options)
    source = model_info(args.model).weights if args.checkpoint == 'zoo' else args.checkpoint
    if source is None:
        raise UserError(f'no weights were published for {args.model!r}')
    for line in describe_file(source):
        print(line)
    content = read_checkpoint(source)
    print(f'holds: {describe(content)}')
    with torch.device('meta'):
        model = build_model(cfg).eval()
    with warnings.catch_warnings():
        # torch's remark that copies to the meta device do nothing, for each parameter.
        warnings.simplefilter('ignore', UserWarning)
        report = compare_weights(
            model, content, ema=True if args.ema else False if args.no_ema else None
        )
    print(f'fit: {report.loaded} tensors, of {len(model.state_dict())} of the model')
    for line in differences(report, args.all):
        print(line)
    if not report.loaded:
        print(
            "None of its names is the model's. Weights of a classifier go into the init_cfg of a "
            "detector's or segmentor's backbone."
        )
    parameters = {name for name, _ in model.named_parameters()}
    lacking = parameters & set(report.missing)
    strange = set(report.unexpected) - set(report.dropped)
    fits = not (lacking or report.left_out or strange)
    print('The checkpoint fits the model.' if fits else 'The checkpoint does NOT fit the model.')
    return fits


def differences(report: LoadReport, everything: bool) -> list[str]:
    """One line for each name that differs, under headings."""
    unknown = [name for name in report.unexpected if name not in report.dropped]
    resized, shapes = (
        [f'{name}: {theirs} in the file, {ours} in the model' for name, (theirs, ours) in table]
        for table in (report.resized.items(), report.left_out.items())
    )
    renamed = [f'{a} -> {b}' for a, b in report.renamed.items()]
    return [
        *(listed('renamed', renamed, True) if everything else [f'renamed: {len(renamed)}']),
        *listed('resized on loading', resized, everything),
        *listed('known, and of no use to this model', report.dropped, everything),
        *listed('MISSING in the file', report.missing, everything),
        *listed('UNEXPECTED in the file', unknown, everything),
        *listed('OF ANOTHER SHAPE', shapes, everything),
    ]


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        try:
            fits = check(args)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        if not fits:
            sys.exit(MISFIT)


if __name__ == '__main__':
    main()
