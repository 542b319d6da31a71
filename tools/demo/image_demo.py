#!/usr/bin/env python
"""Classify, detect or segment images: python tools/demo/image_demo.py MODEL IMAGES --out-dir DIR"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from mmvim.apis.inferencers.common import find_images
from mmvim.apis.outputs import OutputFolder
from mmvim.cli import analysis, demo
from mmvim.errors import UserError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Run a classifier, detector or segmentor on images, and write pictures and '
        'JSON, or show the pictures.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('images', nargs='+', help='files, folders, or patterns in quotes')
    parser.add_argument('--out-dir', type=Path, help='gets vis/*.png and predictions.json')
    parser.add_argument('--no-pictures', action='store_true', help='write only JSON')
    demo.add_arguments(parser)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Run as the command line says."""
    from rich.progress import track

    demo.check_arguments(args)
    cfg = analysis.config_of(args.model, args)
    if cfg.get('default_scope') == 'mmpretrain':
        from mmvim.apis.inferencers.pipeline import reads_videos

        if reads_videos(cfg):
            raise UserError('the model reads videos: tools/demo/video_demo.py runs it')
    images = find_images(args.images)
    stems = demo.unique_stems(images)
    pictures = bool(args.out_dir) and not args.no_pictures
    is_segmentor = cfg.get('default_scope') == 'mmseg'
    folders = [*(['vis'] if pictures else []), *(['labels'] if is_segmentor else [])]
    names = ['predictions.json', *(f'{f}/{stem}.png' for f in folders for stem in stems)]
    with contextlib.ExitStack() as stack:
        out = None
        if args.out_dir:
            out = stack.enter_context(OutputFolder(args.out_dir, names, args.overwrite))
        inferencer = demo.make_demo_inferencer(args, cfg)
        failures = demo.Failures(args, len(images))
        results = inferencer.predict(images, args.batch_size, failures)
        remaining = (stem for i, stem in enumerate(stems) if i not in failures)
        if not args.no_progress:
            results = track(results, 'Inference', total=len(images))
        predictions = []
        for result in results:
            stem = next(remaining)  # known by now: a file is read before a later one's result
            prediction = result.prediction
            picture = inferencer.draw(result) if args.show or pictures else None
            drawn = {}
            if pictures:
                drawn['vis'] = ('picture', picture)
            if out and is_segmentor:
                drawn['labels'] = ('label_map', inferencer.label_map(result))
            for folder, (key, pixels) in drawn.items():
                name = f'{folder}/{stem}.png'
                # By the name of the format: an image may be called '...png', without a suffix.
                Image.fromarray(pixels).save(out.path(name), 'PNG')
                prediction[key] = str(out.final(name))
            if args.show:
                inferencer.visualizer.show(picture)
            predictions.append(prediction)
            print(f'{result.name}: {demo.summary(prediction, inferencer)}')
        failures.report()
        if out:
            text = json.dumps(predictions, indent=2)
            out.path('predictions.json').write_text(f'{text}\n')
    if out:
        print(f'{len(predictions)} images: {out.final("predictions.json")}')


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with analysis.one_line_errors():
        run(args)


if __name__ == '__main__':
    main()
