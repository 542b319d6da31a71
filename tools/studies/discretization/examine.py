#!/usr/bin/env python3
"""A trained model of the study under every method, and the step sizes that it has learnt.

    python tools/studies/discretization/examine.py CONFIG CHECKPOINT METHOD

Prints one line of JSON: under "swaps" the accuracy of the checkpoint when it runs with each method,
under "steps" quantiles of the step size Δ and of -ΔA over test images, by layer and direction.
run.py makes tables of it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor

from mmvim._configs import settle_scope
from mmvim.analysis import record_scans
from mmvim.cli.options import ConfigOptions
from mmvim.ops import DISCRETIZATIONS

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def main(argv: list[str] | None = None) -> int:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('method', choices=DISCRETIZATIONS, help='of the training')
    parser.add_argument('--images', type=int, default=100, help='for the step sizes (default: 100)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, default={})
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    settle_scope(cfg)
    init_default_scope(cfg.default_scope)
    device = get_device()
    inputs, labels = images(cfg, device)
    swaps = [
        dict(
            method=method,
            top1=accuracy(build(cfg, args.checkpoint, method, device), inputs, labels),
        )
        for method in DISCRETIZATIONS
    ]
    model = build(cfg, args.checkpoint, args.method, device)
    # The files are in the order of the classes: some of each.
    chosen = inputs[:: max(1, len(inputs) // args.images)][: args.images]
    print(json.dumps(dict(swaps=swaps, steps=list(steps(model, chosen)))))
    return 0


def build(cfg: Config, checkpoint: Path, method: str, device: str) -> torch.nn.Module:
    """The model with the weights of the checkpoint and a method."""
    backbone = dict(cfg.model.backbone, discretization=method)
    model = MODELS.build(dict(cfg.model, backbone=backbone))
    load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
    return model.to(device).eval()


def images(cfg: Config, device: str) -> tuple[Tensor, Tensor]:
    """The test images as the model takes them, (N, 3, H, W) on the device, and labels (N,)."""
    preprocessor = MODELS.build(dict(cfg.model.data_preprocessor, type='ClsDataPreprocessor'))
    inputs, labels = [], []
    for batch in Runner.build_dataloader(cfg.test_dataloader):
        labels += [sample.gt_label for sample in batch['data_samples']]
        inputs.append(preprocessor(batch)['inputs'])
    return torch.cat(inputs).to(device), torch.cat(labels).to(device)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, inputs: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of right answers in percent, with the precision of the trainings."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        scores = [model(part, mode='tensor') for part in inputs.split(batch)]
    right = torch.cat(scores).argmax(1) == labels
    return round(100 * float(right.float().mean()), 2)


def steps(model: torch.nn.Module, inputs: Tensor):
    """Quantiles of Δ and of -ΔA, one row a layer and direction."""
    for scan in record_scans(model.backbone, inputs):
        delta = scan.delta.float().flatten()
        decay = -(scan.delta.float().flatten(0, 1).unsqueeze(-1) * scan.A.float()).flatten()
        row = dict(layer=scan.layer, direction=scan.direction)
        for name, values in (('delta', delta), ('decay', decay)):
            # torch.quantile takes at most 2^24 values.
            values = values.sort().values
            for q in QUANTILES:
                row[f'{name}_{100 * q:g}'] = float(f'{values[int(q * (len(values) - 1))]:.4g}')
        yield row


if __name__ == '__main__':
    sys.exit(main())
