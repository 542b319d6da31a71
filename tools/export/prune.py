#!/usr/bin/env python
"""Accuracy of a classifier against its share of pruned weights: python tools/export/prune.py"""

import argparse
import csv
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.nn.utils import prune

from mmvim._configs import merge_options
from mmvim.apis import load_config
from mmvim.apis.inferencers.common import make_model
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Set the smallest weights of all linear layers to zero (torch.nn.utils.prune, '
        "global, L1) and test on the config's test set, without training again."
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('--weights', required=True, help='checkpoint')
    parser.add_argument(
        '--amounts', nargs='+', type=float, default=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    )
    parser.add_argument('--out', type=Path, help='checkpoint of the last amount, to export or tune')
    parser.add_argument('--csv', type=Path, help='file that receives the curve')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def pruned(model: nn.Module, amount: float) -> nn.Module:
    """The model with the share ``amount`` of the smallest linear weights set to zero."""
    layers = [(m, 'weight') for m in model.modules() if isinstance(m, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=amount)
    for layer, name in layers:
        prune.remove(layer, name)
    return model


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        if not all(0 <= amount < 1 for amount in args.amounts):
            raise UserError(f'--amounts are shares from 0 to below 1, not {args.amounts}')
        cfg = load_config(args.model)
        merge_options(cfg, args.cfg_options)
        rows = []
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            loader = Runner.build_dataloader(cfg.test_dataloader)
            for amount in sorted(args.amounts):
                model = pruned(make_model(args.model, cfg, args.weights).eval(), amount)
                evaluator = Evaluator(cfg.test_evaluator)
                evaluator.dataset_meta = loader.dataset.metainfo
                with torch.no_grad():
                    for data in loader:
                        evaluator.process(model.test_step(data), data)
                score = next(iter(evaluator.evaluate(len(loader.dataset)).values()))
                rows.append((amount, round(score, 2)))
                print(f'{amount:>6.0%} pruned: {score:.2f}', flush=True)
        if args.csv:
            with args.csv.open('w', newline='') as file:
                csv.writer(file, lineterminator='\n').writerows([('pruned', 'top1'), *rows])
        if args.out:
            torch.save({'state_dict': model.state_dict(), 'meta': model.dataset_meta}, args.out)


if __name__ == '__main__':
    main()
