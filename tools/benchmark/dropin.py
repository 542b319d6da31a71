#!/usr/bin/env python3
"""Time one unchanged program on mamba_ssm and on the drop-in.

    python tools/benchmark/dropin.py --package FOLDER --csv dropin.csv
    python tools/benchmark/dropin.py --package FOLDER --compiled FOLDER --device cuda --csv gpu.csv

`--package` holds mamba_ssm's Python files (an unpacked source distribution), `--compiled` its
selective_scan_cuda. Ways to run tools/benchmark/dropin_program.py, each in a process of its own and
in turns:

- `reference`: mamba_ssm's files with its own scan in PyTorch, what is left without a compiler;
- `fork`: mamba_ssm's files, as of a fork in the user's tree, with the drop-in's compiled modules;
- `drop-in`: all of the drop-in;
- `mamba_ssm`: mamba_ssm's files and its compiled scan, on a GPU, with the drop-in's convolution in
  place of causal_conv1d.

Times of a CPU are seconds of one core. The program's loss and gradient must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import open_rows

REPO = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name('dropin_program.py')
FIELDS = (
    *('way', 'direction', 'device', 'batch', 'length', 'dim', 'depth', 'milliseconds', 'lowest'),
    *('highest', 'rounds', 'loss', 'gradient'),
)


def ways_of(args: argparse.Namespace) -> dict[str, tuple[list[str], list[Path]]]:
    """For each way the words before the program's own, and what lies on the import path."""
    dropin = ['-m', 'mmvim.dropin']
    ways = {'drop-in': ([*dropin, '--override', str(PROGRAM)], [])}
    if args.package is not None:
        ways['fork'] = ([*dropin, str(PROGRAM)], [args.package])
        if args.device == 'cpu':
            ways['reference'] = ([*dropin, str(PROGRAM), '--reference'], [args.package])
        if args.compiled is not None:
            ways['mamba_ssm'] = ([*dropin, str(PROGRAM)], [args.package, args.compiled])
    return ways


def run(words: list[str], path: list[Path], args: argparse.Namespace) -> dict:
    """Run the program once."""
    options = [f'--{k}={getattr(args, k)}' for k in ('device', 'batch', 'length', 'dim', 'depth')]
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join(map(str, [REPO, *path])),
        'OMP_NUM_THREADS': '1',
    }
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *words, *options, f'--times={args.times}'],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f'{" ".join(words)} failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run all ways in turns, and write a row for each and its direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--package', type=Path, help="folder with mamba_ssm's Python files")
    parser.add_argument('--compiled', type=Path, help='folder with its selective_scan_cuda')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--length', type=int, default=197)
    parser.add_argument('--dim', type=int, default=192)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--times', type=int, default=2, help='calls in each process')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--csv', type=Path)
    args = parser.parse_args()
    ways = ways_of(args)
    results = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, (words, path) in ways.items():
            results[way].append(run(words, path, args))
            print(way, results[way][-1], flush=True)
    kind = torch.cuda.get_device_name() if args.device == 'cuda' else 'one core of a CPU'
    tolerance = 1e-3 if args.device == 'cpu' else 5e-2
    with open_rows(args.csv, FIELDS, f'# {kind}, torch {torch.__version__}') as write:
        for way, rounds in results.items():
            for name in ('loss', 'gradient'):
                one, two = rounds[0][name], results['drop-in'][0][name]
                if abs(one - two) > tolerance * abs(two):
                    raise SystemExit(f'{way}: {name} {one}, but {two} with the drop-in')
            for direction in ('inference', 'training'):
                times = [r[direction] for r in rounds]
                row = dict(way=way, direction=direction, device=args.device, batch=args.batch)
                row |= dict(length=args.length, dim=args.dim, depth=args.depth)
                row |= dict(milliseconds=round(statistics.median(times), 2))
                row |= dict(lowest=round(min(times), 2), highest=round(max(times), 2))
                row |= dict(rounds=args.rounds)
                row |= dict(loss=rounds[0]['loss'], gradient=rounds[0]['gradient'])
                write(row)
                print(f'{way:10} {direction:10} {row["milliseconds"]:10.1f} ms')


if __name__ == '__main__':
    main()
