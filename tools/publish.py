#!/usr/bin/env python
"""Strip a checkpoint to its weights and put its hash into its name: python tools/publish.py …"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmvim.checkpoints.files import find_weights, read_checkpoint, write_checkpoint
from mmvim.cli.diagnosis import reported_errors
from mmvim.errors import CheckpointError, UserError

#: Of the metadata only what says which classes the outputs are, and what it was made with.
KEPT = ('dataset_meta', 'mmengine_version', 'epoch', 'iter', 'source', 'config')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Write only the weights (no optimizer, no history, no config with paths) to '
        'OUT-<first 8 digits of its sha256>.pth, a name that torch.hub and mmengine check.'
    )
    parser.add_argument('checkpoint')
    parser.add_argument('out', type=Path, help='.pth or .safetensors; the hash is inserted')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--ema', action='store_true', help='publish the averaged weights')
    weights.add_argument('--no-ema', action='store_true', help='publish the trained weights')
    parser.add_argument('--overwrite', action='store_true')
    return parser.parse_args()


def publish(args: argparse.Namespace) -> Path:
    """Write the file and return its path."""
    content = read_checkpoint(args.checkpoint)
    try:
        weights = find_weights(content, ema=True if args.ema else False if args.no_ema else None)
    except CheckpointError as error:
        raise CheckpointError(f'checkpoint {args.checkpoint!r} {error}') from None
    meta = content.get('meta') or {}
    metadata = getattr(content.get('state_dict'), '_metadata', None)
    if metadata is not None:
        weights = type(content['state_dict'])(weights)
        weights._metadata = metadata
    if args.out.suffix not in ('.pth', '.pt', '.safetensors'):
        raise UserError(f'{str(args.out)!r} must end with .pth, .pt or .safetensors')
    if not args.out.parent.is_dir():
        raise UserError(f'the directory {str(args.out.parent)!r} does not exist')
    temporary = args.out.with_name(f'.{args.out.stem}.unhashed{args.out.suffix}')
    try:
        write_checkpoint(weights, temporary, {k: meta[k] for k in KEPT if k in meta})
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        final = args.out.with_name(f'{args.out.stem}-{digest[:8]}{args.out.suffix}')
        if final.exists() and not args.overwrite:
            raise UserError(f'{str(final)!r} exists; --overwrite replaces it')
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    before = Path(args.checkpoint)
    size = f'{before.stat().st_size / 2**20:.1f} -> ' if before.is_file() else ''
    print(f'{final}: {len(weights)} tensors, {size}{final.stat().st_size / 2**20:.1f} MiB')
    print(f'sha256 {digest}')
    return final


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        publish(args)


if __name__ == '__main__':
    main()
