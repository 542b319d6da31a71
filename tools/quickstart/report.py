#!/usr/bin/env python
"""Pictures and numbers of a finished quickstart: python tools/quickstart/report.py cls WORK_DIR"""

import argparse
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle
from PIL import Image

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.analysis import read_run
from mmvim.datasets.quickstart import DIGIT_CLASSES, SEG_CLASSES, SEG_PALETTE, VIDEO_CLASSES
from mmvim.datasets.video import VideoReader

#: task: (key in mmengine's logs, factor to a per cent value, name, value that the recipe reaches)
METRICS = {
    'cls': ('accuracy/top1', 1.0, 'top-1 accuracy', 97.0),
    'det': ('coco/bbox_mAP_50', 100.0, 'box AP50', 60.0),
    'seg': ('mIoU', 1.0, 'mIoU', 60.0),
    'video': ('accuracy/top1', 1.0, 'top-1 accuracy', 90.0),
}
UNITS = {'cls': 'digits', 'det': 'scenes', 'seg': 'scenes', 'video': 'videos'}
SCORE_THRESHOLD = 0.25
RIGHT, WRONG = '#2a9d3a', '#d62728'


class ReportError(RuntimeError):
    """An output that the report needs is missing; the message names it."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Draw the training curve and test predictions, collect the metrics, and print '
        'where everything is. Reads what tools/train.py and tools/test.py left in WORK_DIR.'
    )
    parser.add_argument('task', choices=list(METRICS))
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('--data-dir', type=Path, default=Path('data/quickstart'))
    return parser.parse_args()


def newest(work_dir: Path, pattern: str) -> Path:
    """The newest file that matches; mmengine names its log folders by time."""
    found = sorted(work_dir.glob(pattern))
    if not found:
        raise ReportError(f'no {pattern} in {work_dir}: run training and test first')
    return found[-1]


def draw_curves(work_dir: Path, task: str, test_value: float) -> Path:
    """Draw the training loss and the validation metric over iterations."""
    key, factor, name, _ = METRICS[task]
    try:
        run = read_run(work_dir)
        steps, values = run.series(key)
    except (KeyError, ValueError) as error:
        raise ReportError(error.args[0]) from error
    train = run.train
    values = [value * factor for value in values]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    left.plot([e['step'] for e in train], [e['loss'] for e in train], color='tab:blue')
    left.set(xlabel='iteration', ylabel='training loss', title='Training loss')
    rate = left.twinx()
    rate.plot([e['step'] for e in train], [e['lr'] for e in train], color='0.7', lw=1)
    rate.set_ylabel('learning rate', color='0.5')
    rate.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    best = int(np.argmax(values))
    right.plot(steps, values, marker='o', ms=3, color='tab:blue', label='validation')
    right.plot(steps[best], values[best], 'o', ms=9, mfc='none', color=RIGHT, label='best, kept')
    right.axhline(test_value, ls='--', lw=1, color=WRONG, label=f'test: {test_value:.1f} %')
    right.set(xlabel='iteration', ylabel=f'{name} (%)', title='Validation', ylim=(None, 101))
    right.legend(loc='lower right')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    return save(figure, work_dir / 'training_curve.png')


def draw_classification(work_dir: Path, data_dir: Path) -> Path:
    """Draw every mistake on the test digits, then digits that were right."""
    samples = load_predictions(work_dir)
    predicted = np.array([int(s['pred_label']) for s in samples])
    true = np.array([int(s['gt_label']) for s in samples])
    score = np.array([float(np.max(np.asarray(s['pred_score']))) for s in samples])
    wrong = np.flatnonzero(predicted != true)
    right = np.flatnonzero(predicted == true)
    columns, rows = 12, 6
    shown = wrong[np.argsort(-score[wrong])][: columns * rows // 2]
    fill = np.random.default_rng(0).permutation(right)[: columns * rows - len(shown)]
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * 0.95, rows * 1.08 + 0.6), layout='constrained'
    )
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.axis('off')
    for cell, index in zip(axes.flat, [*shown, *fill], strict=False):
        cell.axis('on')
        cell.imshow(Image.open(samples[index]['img_path']), cmap='gray')
        good = predicted[index] == true[index]
        text = f'{predicted[index]}' if good else f'{predicted[index]}, is {true[index]}'
        colour = RIGHT if good else WRONG
        cell.set_title(f'{text}  {score[index]:.0%}', fontsize=8, color=colour, pad=3)
        for spine in cell.spines.values():
            spine.set(color=colour, linewidth=2)
    some = '' if len(shown) == len(wrong) else f' (the surest {len(shown)} shown)'
    figure.suptitle(
        f'Held-out digits: {len(right)} of {len(samples)} right, {len(wrong)} wrong{some}. '
        'Prediction and its probability; mistakes first, in red.',
        fontsize=10,
    )
    return save(figure, work_dir / 'predictions.png')


def draw_detection(work_dir: Path, data_dir: Path) -> Path:
    """Draw predicted boxes, and the true ones dashed, on test scenes."""
    with open(data_dir / 'det' / 'annotations' / 'instances_test.json') as file:
        content = json.load(file)
    truth: dict[int, list[dict]] = {}
    for annotation in content['annotations']:
        truth.setdefault(annotation['image_id'], []).append(annotation)
    samples = load_predictions(work_dir)
    figure, axes = plt.subplots(3, 5, figsize=(14, 9), layout='constrained')
    for cell, index in zip(axes.flat, spread(len(samples), axes.size), strict=True):
        sample = samples[index]
        cell.imshow(Image.open(sample['img_path']))
        cell.axis('off')
        for annotation in truth.get(sample['img_id'], []):
            x, y, w, h = annotation['bbox']
            cell.add_patch(
                Rectangle((x - 0.5, y - 0.5), w, h, fill=False, ec='white', ls='--', lw=1)
            )
        draw_boxes(cell, sample)
    figure.suptitle(
        f'Held-out digits on held-out photographs: predictions above {SCORE_THRESHOLD:.0%} with '
        'their scores; true boxes white, dashed.',
        fontsize=11,
    )
    return save(figure, work_dir / 'predictions.png')


def draw_boxes(cell: plt.Axes, sample: dict[str, Any]) -> None:
    """Draw the predicted boxes with their classes and scores."""
    found = sample['pred_instances']
    boxes, labels, scores = (np.asarray(found[k]) for k in ('bboxes', 'labels', 'scores'))
    for box, label, score in zip(boxes, labels, scores, strict=True):
        if score < SCORE_THRESHOLD:
            continue
        colour = class_colour(int(label) + 1)
        x1, y1, x2, y2 = box - 0.5
        cell.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=1.8))
        cell.text(
            x1,
            y1 - 1,
            f'{DIGIT_CLASSES[label]} {score:.0%}',
            fontsize=8,
            va='bottom',
            color='black',
            bbox={'boxstyle': 'square,pad=0.15', 'fc': colour, 'ec': 'none'},
            clip_on=False,
        )


def draw_segmentation(work_dir: Path, data_dir: Path) -> Path:
    """Draw test scenes, their true label maps and the predicted ones."""
    images = sorted((data_dir / 'seg' / 'images' / 'test').glob('*.jpg'))
    maps = work_dir / 'test' / 'label_maps'
    columns = 7
    figure, axes = plt.subplots(3, columns, figsize=(14, 6.9), layout='constrained')
    seen: set[int] = set()
    for column, index in enumerate(spread(len(images), columns)):
        path = images[index]
        image = np.asarray(Image.open(path))
        annotation = data_dir / 'seg' / 'annotations' / 'test' / f'{path.stem}.png'
        true = np.asarray(Image.open(annotation)).astype(int) - 1
        predicted = read_prediction(maps / f'{path.stem}.png')
        seen |= set(np.unique(true[true > 0])) | set(np.unique(predicted[predicted > 0]))
        for row, picture in enumerate((image, overlay(image, true), overlay(image, predicted))):
            axes[row, column].imshow(picture)
            axes[row, column].set(xticks=[], yticks=[])
    for row, name in enumerate(('scene', 'truth', 'prediction')):
        axes[row, 0].set_ylabel(name, fontsize=11)
    figure.legend(
        handles=[Patch(color=class_colour(i), label=SEG_CLASSES[i]) for i in sorted(seen)],
        loc='outside lower center',
        ncols=len(SEG_CLASSES),
        frameon=False,
    )
    figure.suptitle('Held-out digits on held-out photographs', fontsize=11)
    return save(figure, work_dir / 'predictions.png')


def draw_video(work_dir: Path, data_dir: Path) -> Path:
    """Draw frames of test videos: the surest mistakes first, then videos that were right."""
    samples = load_predictions(work_dir)
    predicted = np.array([int(s['pred_label']) for s in samples])
    true = np.array([int(s['gt_label']) for s in samples])
    score = np.array([float(np.max(np.asarray(s['pred_score']))) for s in samples])
    wrong = np.flatnonzero(predicted != true)
    right = np.flatnonzero(predicted == true)
    rows, frames = 10, 8
    shown = wrong[np.argsort(-score[wrong])][: rows // 2]
    fill = np.random.default_rng(0).permutation(right)[: rows - len(shown)]
    figure, axes = plt.subplots(
        rows, frames, figsize=(frames * 0.95 + 2.2, rows * 0.95 + 0.6), layout='constrained'
    )
    for row, index in zip(axes, [*shown, *fill], strict=False):
        with VideoReader(samples[index]['img_path']) as video:
            pictures = video.frames(np.linspace(0, len(video) - 1, frames).astype(int))
        good = predicted[index] == true[index]
        for cell, picture in zip(row, pictures, strict=True):
            cell.imshow(picture.permute(1, 2, 0).numpy())
        text = VIDEO_CLASSES[predicted[index]]
        text += '' if good else f'\nis {VIDEO_CLASSES[true[index]]}'
        row[0].set_ylabel(
            f'{text}\n{score[index]:.0%}', rotation=0, ha='right', va='center', fontsize=9,
            color=RIGHT if good else WRONG,
        )  # fmt: skip
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
    figure.suptitle(
        f'Held-out videos: {len(right)} of {len(samples)} right, {len(wrong)} wrong.\n'
        'Prediction and its probability; mistakes first, in red.',
        fontsize=10,
    )
    return save(figure, work_dir / 'predictions.png')


def read_prediction(path: Path) -> np.ndarray:
    """A predicted label map as class indices (mmseg writes them with the zero label put back)."""
    if not path.is_file():
        raise ReportError(f'no {path}: run tools/test.py with --out first')
    return np.asarray(Image.open(path)).astype(int) - 1


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The image, greyed, under its digits' colours."""
    grey = np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1) * 0.7
    colours = np.array(SEG_PALETTE, float)[np.clip(labels, 0, None)]
    return np.where((labels > 0)[..., None], 0.15 * grey + 0.85 * colours, grey).astype(np.uint8)


def class_colour(index: int) -> tuple[float, float, float]:
    """Colour of a class of ``SEG_CLASSES`` in [0, 1]."""
    red, green, blue = SEG_PALETTE[index]
    return red / 255, green / 255, blue / 255


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices below ``count``, the same each time."""
    if count < wanted:
        raise ReportError(f'{wanted} test images are drawn and only {count} were found')
    return sorted(np.random.default_rng(1).permutation(count)[:wanted].tolist())


def load_predictions(work_dir: Path) -> list[dict[str, Any]]:
    """The predictions that ``tools/test.py --out`` wrote."""
    path = work_dir / 'test' / 'predictions.pkl'
    if not path.is_file():
        raise ReportError(f'no {path}: run tools/test.py with --out first')
    with open(path, 'rb') as file:
        return pickle.load(file)


def save(figure: plt.Figure, path: Path) -> Path:
    """Write and close a figure."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


DRAW = {
    'cls': draw_classification,
    'det': draw_detection,
    'seg': draw_segmentation,
    'video': draw_video,
}


def report(task: str, work_dir: Path, data_dir: Path) -> bool:
    """Draw, collect and print; return whether the recipe's usual result was reached."""
    key, factor, name, usual = METRICS[task]
    with open(newest(work_dir / 'test', '[0-9]*/[0-9]*.json')) as file:
        metrics = json.load(file)
    if key not in metrics:
        raise ReportError(f'{key} is not among the test metrics {sorted(metrics)}')
    value = metrics[key] * factor
    curve = draw_curves(work_dir, task, value)
    pictures = DRAW[task](work_dir, data_dir)
    run = {}
    if (work_dir / 'run.json').is_file():
        with open(work_dir / 'run.json') as file:
            run = json.load(file)
    out = work_dir / 'metrics.json'
    with open(out, 'w') as file:
        json.dump({'task': task, **run, 'test': metrics}, file, indent=2)
    print(f'\n{name}: {value:.2f} % on held-out {UNITS[task]}')
    if 'training_seconds' in run:
        print(f'training took {run["training_seconds"]:.0f} s')
    if 'checkpoint' in run:
        print(f'  checkpoint   {work_dir / run["checkpoint"]}')
    print(f'  curve        {curve}')
    print(f'  predictions  {pictures}')
    print(f'  metrics      {out}')
    print(f'  config       {run.get("config", work_dir)}')
    if value < usual and not run.get('options'):
        print(f'This is less than the {usual:.0f} % that this recipe reaches.', file=sys.stderr)
        return False
    return True


def main() -> int:
    """Run the tool."""
    args = parse_args()
    try:
        return 0 if report(args.task, args.work_dir, args.data_dir) else 2
    except (ReportError, OSError) as error:
        print(f'report: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
