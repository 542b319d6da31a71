#!/usr/bin/env python
"""The README's picture of results, drawn from finished det, seg and video quickstarts.

make quickstart-det quickstart-seg quickstart-video, then python tools/misc/results_picture.py
"""

import argparse
import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'quickstart'))

import report

from mmvim.datasets.quickstart import VIDEO_CLASSES
from mmvim.datasets.video import VideoReader

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / 'docs' / 'get_started' / 'pictures' / 'results.png'
FRAMES = 5
DIRECTIONS = ('up', 'down', 'left', 'right')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'quickstart')
    parser.add_argument('--data-dir', type=Path, default=ROOT / 'data' / 'quickstart')
    parser.add_argument('--out', type=Path, default=PICTURE)
    parser.add_argument('--seed', type=int, default=0, help='of the choice of test samples')
    return parser.parse_args()


def draw_detection(part, work_dir: Path, data_dir: Path, rng: np.random.Generator) -> None:
    """Four scenes with the predicted boxes."""
    part.suptitle('Detection (FCOS on Vim)', fontsize=10)
    samples = report.load_predictions(work_dir)
    for cell, index in zip(part.subplots(2, 2).flat, rng.permutation(len(samples)), strict=False):
        # The run's paths are relative to the repository.
        name = Path(samples[index]['img_path']).name
        cell.imshow(Image.open(data_dir / 'det' / 'test' / name))
        report.draw_boxes(cell, samples[index])
        cell.set(xticks=[], yticks=[])


def draw_segmentation(part, work_dir: Path, data_dir: Path, rng: np.random.Generator) -> None:
    """Two scenes above their predicted label maps."""
    part.suptitle('Segmentation (UPerNet on Vim)', fontsize=10)
    scenes = sorted((data_dir / 'seg' / 'images' / 'test').glob('*.jpg'))
    cells = part.subplots(2, 2)
    for column, index in zip(cells.T, rng.permutation(len(scenes)), strict=False):
        image = np.asarray(Image.open(scenes[index]))
        map_path = work_dir / 'test' / 'label_maps' / f'{scenes[index].stem}.png'
        column[0].imshow(image)
        column[1].imshow(report.overlay(image, report.read_prediction(map_path)))
    for cell in cells.flat:
        cell.set(xticks=[], yticks=[])


def draw_video(part, work_dir: Path, data_dir: Path, rng: np.random.Generator) -> None:
    """Frames of a video of each direction, with the predicted class and its probability."""
    part.suptitle('Video (VideoMamba): digit and direction', fontsize=10)
    samples = report.load_predictions(work_dir)
    truth = [VIDEO_CLASSES[int(sample['gt_label'])] for sample in samples]
    for row, direction in zip(part.subplots(len(DIRECTIONS), FRAMES), DIRECTIONS, strict=True):
        index = rng.choice([i for i, name in enumerate(truth) if name.endswith(direction)])
        sample = samples[index]
        with VideoReader(data_dir / 'video' / 'test' / Path(sample['img_path']).name) as video:
            frames = video.frames(np.linspace(0, len(video) - 1, FRAMES).astype(int))
        for cell, frame in zip(row, frames, strict=True):
            cell.imshow(frame.permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[])
        predicted = VIDEO_CLASSES[int(sample['pred_label'])]
        row[0].set_ylabel(
            f'{predicted}\n{float(np.max(np.asarray(sample["pred_score"]))):.0%}',
            rotation=0, ha='right', va='center', fontsize=9,
            color=report.RIGHT if predicted == truth[index] else report.WRONG,
        )  # fmt: skip


def main() -> int:
    """Run the tool."""
    args = parse_args()
    rng = np.random.default_rng(args.seed)
    figure = plt.figure(figsize=(11, 3.9), layout='constrained')
    parts = figure.subfigures(1, 3, width_ratios=[3.35, 3.35, 4.4])
    try:
        draw_detection(parts[0], args.work_dir / 'det', args.data_dir, rng)
        draw_segmentation(parts[1], args.work_dir / 'seg', args.data_dir, rng)
        draw_video(parts[2], args.work_dir / 'video', args.data_dir, rng)
    except (report.ReportError, OSError) as error:
        print(f'{Path(__file__).name}: {error}', file=sys.stderr)
        return 1
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=100)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # A palette of 256 colours: a third of the size, and hardly visible.
    Image.open(pixels).convert('RGB').quantize(256).save(args.out, optimize=True)
    print(f'{args.out}: {args.out.stat().st_size / 1024:.0f} KiB')
    return 0


if __name__ == '__main__':
    sys.exit(main())
