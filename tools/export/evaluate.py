#!/usr/bin/env python
"""Accuracy and latency of exported classifiers: python tools/export/evaluate.py FILE …"""

import argparse
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from mmvim._configs import merge_options
from mmvim.apis import build_model, get_model, load_config
from mmvim.apis.inputs import DEFAULT_SIDE, input_shape
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError
from mmvim.export.formats import (
    Exportable,
    as_function,
    format_of,
    latency,
    open_exported,
    read_metadata,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Time exported files (and the model itself), and, with --accuracy, test '
        "classifiers on the config's test set."
    )
    parser.add_argument('files', nargs='*', help='files of tools/export/export.py')
    parser.add_argument('--model', help='config or name, to time the model in PyTorch too')
    parser.add_argument('--weights', help='checkpoint of --model')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='SIDE',
        help="height and width to time (default: the first file's, else the model's)",
    )
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--accuracy', action='store_true', help='test on the data of --model')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def accuracies(cfg, functions: dict) -> dict[str, float]:
    """Top-1 accuracy of each function on the test set of a config, in per cent."""
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner

    preprocess = build_model(cfg).data_preprocessor
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(cfg.test_dataloader)
        right = dict.fromkeys(functions, 0)
        total = 0
        for data in loader:
            data = preprocess(data, training=False)
            labels = torch.cat([sample.gt_label for sample in data['data_samples']]).numpy()
            images = data['inputs'].float().numpy()
            total += len(labels)
            for name, function in functions.items():
                right[name] += int((function(images)[0].argmax(1) == labels).sum())
    return {name: 100 * count / total for name, count in right.items()}


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        torch.set_num_threads(args.threads)
        if args.accuracy and not args.model:
            raise UserError('--accuracy needs --model: its config says which data to test on')
        functions, shape = {}, None
        try:
            for file in args.files:
                format_of(file)
                if not Path(file).is_file():
                    raise UserError(f'the file {file!r} does not exist')
                functions[Path(file).name] = open_exported(file, args.threads)
                shape = shape or read_metadata(file).get('shape')
            if args.model:
                cfg = load_config(args.model)
                merge_options(cfg, args.cfg_options)
                model = get_model(cfg, args.weights or False)
                shape = shape or input_shape(cfg, model)
                eager = as_function(Exportable(model))
                functions = {'PyTorch, mmvim ops': eager, **functions}
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        shape = shape or (3, DEFAULT_SIDE, DEFAULT_SIDE)
        if args.shape:
            shape = (*shape[:-2], args.shape[0], args.shape[-1])
        images = np.random.default_rng(0).standard_normal((args.batch, *shape), np.float32)
        scores = accuracies(cfg, functions) if args.accuracy else {}
        print(f'{"file":<36} {"ms":>9} {"top-1":>7}   batch {args.batch}, {args.threads} threads')
        for name, function in functions.items():
            score = f'{scores[name]:>7.2f}' if name in scores else ''
            print(f'{name:<36} {latency(function, images, args.repeats):>9.2f} {score}')


if __name__ == '__main__':
    main()
