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
    parser.add_argument('--images', type=int, default=256, help='for the step sizes (default: 256)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, default={})
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    settle_scope(cfg)
    init_default_scope(cfg.default_scope)
    device = get_device()
    batches = list(Runner.build_dataloader(cfg.test_dataloader))
    swaps = [
        dict(method=method, top1=accuracy(build(cfg, args.checkpoint, method, device), batches))
        for method in DISCRETIZATIONS
    ]
    model = build(cfg, args.checkpoint, args.method, device)
    print(json.dumps(dict(swaps=swaps, steps=list(steps(model, batches[0], args.images)))))
    return 0


def build(cfg: Config, checkpoint: Path, method: str, device: str) -> torch.nn.Module:
    """The model with the weights of the checkpoint and a method."""
    backbone = dict(cfg.model.backbone, discretization=method)
    model = MODELS.build(dict(cfg.model, backbone=backbone))
    load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
    return model.to(device).eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, batches: list[dict]) -> float:
    """Share of right answers in percent, with the precision of the trainings."""
    right = total = 0
    device = next(model.parameters()).device.type
    for batch in batches:
        with torch.autocast(device, torch.bfloat16):
            samples = model.test_step(batch)
        right += sum(int(s.pred_label) == int(s.gt_label) for s in samples)
        total += len(samples)
    return round(100 * right / total, 2)


def steps(model: torch.nn.Module, batch: dict, images: int):
    """Quantiles of Δ and of -ΔA, one row a layer and direction."""
    inputs = model.data_preprocessor(batch)['inputs'][:images]
    for scan in record_scans(model.backbone, inputs):
        delta = scan.delta.float().flatten()
        decay = -(scan.delta.float().flatten(0, 1).unsqueeze(-1) * scan.A.float()).flatten()
        row = dict(layer=scan.layer, direction=scan.direction)
        for name, values in (('delta', delta), ('decay', decay)):
            # torch.quantile takes at most 2^24 values.
            values = values[:: max(1, values.numel() >> 22)].sort().values
            for q in QUANTILES:
                row[f'{name}_{100 * q:g}'] = float(f'{values[int(q * (len(values) - 1))]:.4g}')
        yield row


if __name__ == '__main__':
    sys.exit(main())
