#!/usr/bin/env python
"""Rewrite a checkpoint for a config's model: python tools/converters/convert_checkpoint.py …"""

import argparse
import logging
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from mmengine.logging import MMLogger

from mmvim._configs import merge_options
from mmvim.apis import build_model, load_config, load_weights
from mmvim.apis.inputs import input_shape
from mmvim.checkpoints.files import write_checkpoint
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import CheckpointError, UserError
from mmvim.export.formats import Exportable

TOLERANCE = 1e-6


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Load a checkpoint (the authors', mmengine's, safetensors; path or URL) into a "
        "config's model, report what was renamed, resized, missing and unexpected, write it in "
        "mmengine's layout (.pth) or as .safetensors, and compare the outputs of both files."
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('checkpoint', help="file or URL, or 'zoo' for the authors' weights")
    parser.add_argument('out', type=Path, help='.pth or .safetensors file to write')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--ema', action='store_true', help='take the averaged weights')
    weights.add_argument('--no-ema', action='store_true', help='take the trained weights')
    parser.add_argument(
        '--partial', action='store_true', help='allow parameters that the checkpoint does not have'
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='SIDE',
        help="height and width to compare for (default: the model's own)",
    )
    parser.add_argument('--frames', type=int, help="frames of a video (default: the model's)")
    parser.add_argument('--overwrite', action='store_true')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def difference(first: torch.nn.Module, second: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """Largest difference between two models' outputs on random pixels."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [Exportable(model)(images) for model in (first, second)]
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in outputs), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def convert(args: argparse.Namespace) -> None:
    """Convert as the command line says."""
    if args.out.suffix not in ('.pth', '.pt', '.safetensors'):
        raise UserError(f'{str(args.out)!r} must end with .pth, .pt or .safetensors')
    if args.out.exists() and not args.overwrite:
        raise UserError(f'{str(args.out)!r} exists; --overwrite replaces it')
    cfg = load_config(args.model)
    merge_options(cfg, args.cfg_options)
    source = args.checkpoint
    if source == 'zoo':
        from mmvim.apis import model_info

        source = model_info(args.model).weights
        if source is None:
            raise UserError(f'no weights were published for {args.model!r}')
    model = build_model(cfg).eval()
    report = load_weights(model, source, ema=True if args.ema else False if args.no_ema else None)
    print(report)
    lacking = sorted(set(report.missing) & {name for name, _ in model.named_parameters()})
    if lacking and not args.partial:
        raise CheckpointError(
            f'checkpoint {source!r} lacks {len(lacking)} parameters of the model: '
            f'{", ".join(lacking[:3])}; --partial writes a file without them'
        )
    state_dict = model.state_dict()
    for name in lacking:
        del state_dict[name]
    write_checkpoint(state_dict, args.out, {'source': str(source), 'config': str(args.model)})
    again = build_model(cfg).eval()
    again.load_state_dict(model.state_dict())
    for name, parameter in again.named_parameters():
        if name not in lacking:
            torch.nn.init.constant_(parameter, float('nan'))
    load_weights(again, args.out)
    shape = (2, *input_shape(cfg, model, size=args.shape, frames=args.frames))
    worst = difference(model, again, shape)
    if not worst <= TOLERANCE:
        args.out.unlink()
        raise UserError(f'the written file gives other outputs (by {worst:.2g}); it was removed')
    print(f'{args.out}: outputs for {"x".join(map(str, shape))} differ by {worst:.1g}')


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        try:
            convert(args)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error


if __name__ == '__main__':
    main()
