#!/usr/bin/env python
"""CPU time of exported files and of the model in PyTorch: python tools/benchmark/exported.py"""

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from mmvim.apis import get_model, load_config
from mmvim.apis.inputs import input_shape
from mmvim.cli.diagnosis import reported_errors
from mmvim.export.formats import Exportable, as_function, export_model, open_exported

#: runtime: (file, options of the export)
RUNTIMES = {
    'ONNX Runtime': ('m.onnx', {}),
    'ONNX Runtime, custom operator': ('c.onnx', {'custom_ops': True}),
    'AOTInductor': ('m.aoti.pt2', {'dynamic': 'none'}),
    'AOTInductor, custom operators': ('c.aoti.pt2', {'dynamic': 'none', 'custom_ops': True}),
}
FORMATS = {'.onnx': 'onnx', '.pt2': 'aoti'}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Export models with random weights, and run the files and the models in turns. '
        'Times are those of all threads together, so other work on the machine matters little.'
    )
    parser.add_argument('models', nargs='+', help='configs or names of the model zoo')
    parser.add_argument(
        '--runtimes', nargs='+', default=list(RUNTIMES)[:2], choices=RUNTIMES, metavar='NAME',
        help=f'some of {", ".join(map(repr, RUNTIMES))} (default: the first two)',
    )  # fmt: skip
    parser.add_argument('--images', type=int, default=1, help='of a batch')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--csv', type=Path, help='file that rows are appended to')
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace, folder: Path) -> list[tuple]:
    """One row for each runtime: model, runtime, images, export (s), times (ms), median ratio."""
    model = get_model(name, False)
    shape = (args.images, *input_shape(load_config(name), model))
    functions, seconds = {'': as_function(Exportable(model))}, {}
    for runtime in args.runtimes:
        file, options = RUNTIMES[runtime]
        kind = FORMATS[Path(file).suffix]
        start = time.process_time()
        export_model(model, folder / file, kind, shape, overwrite=True, **options)
        seconds[runtime] = time.process_time() - start
        functions[runtime] = open_exported(folder / file, 1)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    times = {runtime: [] for runtime in functions}
    for _ in range(args.repeats + 1):
        for runtime, function in functions.items():
            start = time.process_time()
            function(images)
            times[runtime].append(1000 * (time.process_time() - start))
    times = {runtime: np.array(values[1:]) for runtime, values in times.items()}
    eager = times.pop('')
    return [
        (
            name,
            runtime,
            args.images,
            f'{seconds[runtime]:.0f}',
            f'{np.median(values):.1f}',
            f'{np.median(eager):.1f}',
            f'{np.median(values / eager):.2f}',
        )
        for runtime, values in times.items()
    ]


def main() -> None:
    """Run the tool."""
    args = parse_args()
    torch.set_num_threads(1)
    header = 'model', 'runtime', 'images', 'export_s', 'median_ms', 'eager_ms', 'ratio'
    with reported_errors(), tempfile.TemporaryDirectory() as folder:
        print(*header, sep='\t')
        for name in args.models:
            rows = measure(name, args, Path(folder))
            for row in rows:
                print(*row, sep='\t', flush=True)
            if args.csv:
                is_new = not args.csv.exists()
                with open(args.csv, 'a', newline='') as file:
                    csv.writer(file, lineterminator='\n').writerows([header] * is_new + rows)


if __name__ == '__main__':
    main()
