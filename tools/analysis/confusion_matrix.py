#!/usr/bin/env python
"""Confusions of a classifier: python tools/analysis/confusion_matrix.py CONFIG CHECKPOINT --out"""

import argparse
import sys
import tempfile
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmengine.runner import Runner

from mmvim.checkpoints.loading import checked_loading
from mmvim.cli import analysis
from mmvim.cli.console import Console
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Test a classifier with mmpretrain's ConfusionMatrix, draw the matrix (rows: "
        'true classes) and list the commonest confusions.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('weights', help="checkpoint, or 'zoo' for the authors' weights")
    parser.add_argument('--values', action='store_true', help='write the numbers into the picture')
    parser.add_argument('--top', type=int, default=5, help='confusions to list (default: 5)')
    parser.add_argument('--out', type=Path, required=True, help='picture: .png, .jpg, .svg, .pdf')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing picture')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Test and draw as the command line says."""
    cfg = analysis.config_of(args.model, args)
    if cfg.get('default_scope') != 'mmpretrain' or not cfg.get('test_dataloader'):
        raise UserError('a confusion matrix needs the config of a classifier with test data')
    from mmpretrain.evaluation import ConfusionMatrix

    cfg.test_evaluator = {'type': 'ConfusionMatrix'}
    cfg.load_from, cfg.resume = analysis.weights_of(args.model, args.weights), False
    with tempfile.TemporaryDirectory() as folder, Console().watch():
        cfg.work_dir = folder
        runner = Runner.from_cfg(cfg)
        with checked_loading(runner, complete=True):
            matrix = runner.test()['confusion_matrix/result']
        classes = runner.test_dataloader.dataset.metainfo.get('classes')
    names = classes or [str(i) for i in range(len(matrix))]
    figure = ConfusionMatrix.plot(matrix, classes=classes, include_values=args.values)
    with analysis.complete_file(args.out) as path:
        figure.savefig(path)
    right = float(matrix.diagonal().sum()) / max(float(matrix.sum()), 1)
    print(f'{int(matrix.sum())} samples, {right:.2%} right: {args.out}')
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    for place in wrong.argsort(descending=True, stable=True)[: args.top].tolist():
        if wrong[place] > 0:
            true, given = divmod(place, len(matrix))
            print(f'  {int(wrong[place])} x {names[true]} taken for {names[given]}')


if __name__ == '__main__':
    analysis.run(run, parse_args())
