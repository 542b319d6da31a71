#!/usr/bin/env python
"""Classify, detect or segment images: python tools/demo/image_demo.py MODEL IMAGES --out-dir DIR"""

import argparse
import json
import logging
import sys
from pathlib import Path

# The package beside this script is the one that runs, installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from PIL import Image

from mmvim.apis import load_config
from mmvim.apis.inferencers import make_inferencer
from mmvim.apis.inferencers.common import find_images
from mmvim.engine.errors import UserError, reported_errors


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Run a classifier, detector or segmentor on images, and write pictures and '
        'JSON, or show the pictures.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('images', nargs='+', help='files, folders, or patterns in quotes')
    parser.add_argument(
        '--weights', help="checkpoint (path or URL), or 'zoo' for the authors' weights"
    )
    parser.add_argument('--out-dir', type=Path, help='gets vis/*.png and predictions.json')
    parser.add_argument('--no-pictures', action='store_true', help='write only JSON')
    parser.add_argument('--show', action='store_true', help='show the pictures in a window')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', help='default: the first accelerator, else the CPU')
    parser.add_argument(
        '--score-threshold', type=float, default=0.3, help='of detections (default: 0.3)'
    )
    parser.add_argument('--no-progress', action='store_true')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE'
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Run as the command line says."""
    from rich.progress import track

    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, not {args.batch_size}')
    if args.device:
        try:
            torch.zeros(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f'--device {args.device!r} cannot be used: {reason}') from error
    images = find_images(args.images)
    cfg = load_config(args.model)
    cfg.merge_from_dict(args.cfg_options)
    weights = args.weights
    if weights == 'zoo':
        from mmvim.apis import model_info

        weights = model_info(args.model).weights
        if weights is None:
            raise UserError(f'no weights were published for {args.model!r}')
    inferencer = make_inferencer(cfg, weights, args.device)
    if hasattr(inferencer, 'score_threshold'):
        inferencer.score_threshold = args.score_threshold
    results = inferencer.predict(images, args.batch_size)
    if not args.no_progress:
        results = track(results, 'Inference', total=len(images))
    predictions, used = [], set()
    draws = args.show or (args.out_dir and not args.no_pictures)
    for result in results:
        prediction = result.prediction
        if draws:
            picture = inferencer.draw(result)
        if args.out_dir:
            stem = unique(Path(result.name).stem, used)
            if not args.no_pictures:
                prediction['picture'] = save(picture, args.out_dir / 'vis' / f'{stem}.png')
            if hasattr(inferencer, 'label_map'):
                labels = inferencer.label_map(result)
                prediction['label_map'] = save(labels, args.out_dir / 'labels' / f'{stem}.png')
        if args.show:
            inferencer.visualizer.show(picture)
        predictions.append(prediction)
        print(f'{result.name}: {summary(prediction)}')
    if args.out_dir:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        path = args.out_dir / 'predictions.json'
        path.write_text(json.dumps(predictions, indent=2) + '\n')
        print(f'{len(predictions)} images: {path}')


def unique(stem: str, used: set[str]) -> str:
    """A name of its own for each image: two folders may hold the same one."""
    name, number = stem, 1
    while name in used:
        number += 1
        name = f'{stem}_{number}'
    used.add(name)
    return name


def save(picture: np.ndarray, path: Path) -> str:
    """Write a picture and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return str(path)


def summary(prediction: dict) -> str:
    """One line for people."""
    for key, value in (('classes', 'score'), ('objects', 'score'), ('areas', 'share')):
        if key in prediction:
            found = prediction[key]
            some = ', '.join(f'{item["class"]} {item[value]:.0%}' for item in found[:5])
            return f'{some or "nothing"}{" …" if len(found) > 5 else ""}'
    return ''


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        try:
            run(args)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error


if __name__ == '__main__':
    main()
