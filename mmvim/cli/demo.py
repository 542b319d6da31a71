"""Common parts of the command lines of ``tools/demo``."""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmvim.datasets.video.lists import read_classes
from mmvim.errors import SampleError, UserError

from .analysis import weights_of
from .options import ConfigOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the model and the way it runs."""
    parser.add_argument(
        '--weights', help="checkpoint (path or URL), or 'zoo' for the authors' weights"
    )
    parser.add_argument(
        '--classes',
        metavar='FILE',
        help='names of the classes: one a line, or JSON that numbers them',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace existing output files')
    parser.add_argument('--show', action='store_true', help='show the pictures in a window')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', help='default: the first accelerator, else the CPU')
    parser.add_argument(
        '--score-threshold', type=float, default=0.3, help='of detections (default: 0.3)'
    )
    parser.add_argument(
        '--skip-failures',
        action='store_true',
        help='go on without files that cannot be read, and list them at the end',
    )
    parser.add_argument('--no-progress', action='store_true', help='no progress bar')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments before anything is loaded.

    Raises:
        UserError: An argument is wrong; the message names it.
    """
    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, not {args.batch_size}')
    if args.classes and not Path(args.classes).is_file():
        raise UserError(f'--classes {args.classes!r} does not exist')
    if args.device:
        try:
            torch.zeros(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f'--device {args.device!r} cannot be used: {reason}') from error


class Failures(dict):
    """Files that cannot be read: number to error. Without ``--skip-failures`` the first is raised.

    Args:
        args: The command line.
        count: Number of files.
    """

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        super().__init__()
        self.skips = args.skip_failures
        self.count = count

    def __call__(self, number: int, error: SampleError) -> None:
        """Take note of a file, or raise its error."""
        if not self.skips:
            raise SampleError(f'{error}; --skip-failures goes on without it') from error
        self[number] = error

    def report(self) -> None:
        """List the files on stderr.

        Raises:
            UserError: No file could be read.
        """
        if self and len(self) == self.count:
            raise UserError(f'none of the {self.count} files can be read: {self[0]}')
        for error in self.values():
            print(f'skipped: {error}', file=sys.stderr)
        if self:
            print(f'{len(self)} of {self.count} files were skipped', file=sys.stderr)


def make_demo_inferencer(args: argparse.Namespace, cfg: Config) -> Any:
    """Make the inferencer chosen on the command line.

    Raises:
        UserError: ``--weights zoo`` for a model without weights.
    """
    from mmvim.apis.inferencers import make_inferencer
    from mmvim.apis.inferencers.common import name_classes

    inferencer = make_inferencer(cfg, weights_of(args.model, args.weights), args.device)
    if hasattr(inferencer, 'score_threshold'):
        inferencer.score_threshold = args.score_threshold
    if args.classes:
        names = read_classes(args.classes)
        name_classes(inferencer.model, names)
        inferencer.classes = names  # where mmpretrain's inferencer looks for them
    return inferencer


def unique_stems(names: Iterable[str]) -> list[str]:
    """A distinct file name without suffix for each path: folders may share names."""
    used: dict[str, None] = {}
    for name in names:
        stem = free = Path(name).stem
        number = 1
        while free in used:
            number += 1
            free = f'{stem}_{number}'
        used[free] = None
    return list(used)


def summary(prediction: Mapping[str, Any], inferencer: Any) -> str:
    """One line of text about a prediction, with a warning of random weights."""
    remark = ' (random weights: it means nothing)' if inferencer.model.has_random_weights else ''
    for key, value in (('classes', 'score'), ('objects', 'score'), ('areas', 'share')):
        if key in prediction:
            found = prediction[key]
            some = ', '.join(f'{item["class"]} {item[value]:.0%}' for item in found[:5])
            return f'{some or "nothing"}{" …" if len(found) > 5 else ""}{remark}'
    return remark
