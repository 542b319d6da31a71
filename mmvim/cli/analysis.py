"""Common parts of those command lines of ``tools/analysis`` that look into a model."""

import argparse
import contextlib
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmvim._configs import merge_options
from mmvim.apis.model_zoo import load_config, published_weights
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError

PICTURES = ('.png', '.jpg', '.svg', '.pdf')


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on errors that the user can fix, and silence other logs."""
    with reported_errors():
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        try:
            yield
        except FileExistsError as error:
            raise UserError(f'{error}; --overwrite replaces it') from error
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser, *, frames: bool = True) -> None:
    """Add the flags for the model, its input and the output picture."""
    parser.add_argument('--out', type=Path, required=True, help='picture: .png, .jpg, .svg, .pdf')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing picture')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='SIDE',
        help="height and width (default: the model's img_size, else 224)",
    )
    if frames:
        parser.add_argument('--frames', type=int, help='frames of a video, for a video model')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments before anything is loaded.

    Raises:
        UserError: An argument is wrong; the message names it.
    """
    if args.out.suffix not in PICTURES:
        raise UserError(f'--out {str(args.out)!r} must end with one of {", ".join(PICTURES)}')
    if args.out.exists() and not args.overwrite:
        raise UserError(f'{str(args.out)!r} exists; --overwrite replaces it')
    if not args.out.parent.is_dir():
        raise UserError(f'the directory {str(args.out.parent)!r} does not exist')
    if getattr(args, 'shape', None) and (len(args.shape) > 2 or min(args.shape) < 1):
        raise UserError(f'--shape takes one or two positive sides, not {args.shape}')
    if getattr(args, 'frames', None) is not None and args.frames < 1:
        raise UserError(f'--frames must be at least 1, not {args.frames}')


def config_of(model: str, args: argparse.Namespace) -> Config:
    """The config of a name or path, with the changes of the command line."""
    cfg = load_config(model)
    merge_options(cfg, args.cfg_options)
    return cfg


def weights_of(model: str, weights: str | None) -> str | None:
    """A checkpoint's path or URL; 'zoo' means the authors' weights of the model.

    Raises:
        UserError: The model has none.
    """
    try:
        return published_weights(model) if weights == 'zoo' else weights
    except ValueError as error:
        raise UserError(str(error)) from error


def note_on(weights: str | None) -> str:
    """Note on random weights for a picture's title, also written to stderr."""
    if weights:
        return ''
    print('note: without --weights the model is random, and so is what it shows', file=sys.stderr)
    return ' (random weights)'


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to, which gets its final name on success."""
    temporary = path.with_name(f'.{uuid.uuid4().hex[:8]}{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(tool: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a tool; an error that the user can fix ends it with one line and exit code 2."""
    with one_line_errors():
        check_arguments(args)
        tool(args)
