"""Generate miniatures in the exact layouts of public data sets.

These are ImageNet-1K, COCO 2017, ADEChallengeData2016, Kinetics-400, Something-Something V2,
Breakfast and COIN.

The pictures are procedural (textured grounds with textured shapes on them); the folders, file
names, identifiers and annotation formats are the real ones, so that a config or a data pipeline can
be tried without the downloads::

    python tools/misc/make_miniature_data.py --out data
    python tools/train.py configs/vim/vim-tiny_8xb128_in1k.py \\
        --cfg-options train_dataloader.batch_size=4

Below ``--out`` lie afterwards the folders that the configs name:

- ``imagenet/{train,val}/<wnid>/*.JPEG`` and ``imagenet/meta/{train,val}.txt``;
- ``coco/{train2017,val2017}/*.jpg`` and ``coco/annotations/instances_{train,val}2017.json``;
- ``ade/ADEChallengeData2016/{images,annotations}/{training,validation}/``;
- ``kinetics400/annotations/kinetics_{train,val}.csv``, ``kinetics400/videos_{train,val}/<class>/``;
- ``sthv2/annotations/something-something-v2-{train,validation,labels}.json``, ``sthv2/videos/``;
- ``{breakfast,coin}/annotations/{train,val}.csv``, ``{breakfast,coin}/videos/``.

The same arguments give the same pixels. Needs numpy and Pillow, and PyAV for the videos.
"""

import argparse
import colorsys
import csv
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

MARKER = 'MINIATURE.txt'
ADE_CLASSES = 150
# Identifiers and names as in instances_train2017.json: 80 classes, identifiers up to 90 with gaps.
COCO_CATEGORIES = {
    'person': '1 person',
    'vehicle': '2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat',
    'outdoor': '10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench',
    'animal': (
        '16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, '
        '24 zebra, 25 giraffe'
    ),
    'accessory': '27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase',
    'sports': (
        '34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, '
        '40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket'
    ),
    'kitchen': '44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl',
    'food': (
        '52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, '
        '59 pizza, 60 donut, 61 cake'
    ),
    'furniture': '62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet',
    'electronic': '72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone',
    'appliance': '78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator',
    'indoor': (
        '84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush'
    ),
}


def imagenet_wnids() -> list[str]:
    """Return the 1,000 WordNet identifiers of ILSVRC 2012, sorted: the index is the label."""
    return Path(__file__).with_name('imagenet_wnids.txt').read_text().split()


def _lines(name: str) -> list[str]:
    """Return the lines of a list next to this script."""
    return Path(__file__).with_name(name).read_text().splitlines()


def coco_categories() -> list[dict]:
    """Return the ``categories`` list of the COCO 2017 instance files."""
    return [
        {'supercategory': group, 'id': int(identifier), 'name': name}
        for group, members in COCO_CATEGORIES.items()
        for identifier, name in (member.split(' ', 1) for member in members.split(', '))
    ]


def _rng(seed: int, name: str) -> np.random.Generator:
    """Return a generator that depends on the picture's name, not on the order of generation."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _class_color(label: int) -> np.ndarray:
    """Return a colour of its own for each label, far from that of its neighbours."""
    hue = label * 0.618034 % 1.0
    return 255.0 * np.array(colorsys.hsv_to_rgb(hue, 0.5 + 0.4 * (label % 3) / 2, 0.75))


def _texture(rng: np.random.Generator, size: tuple[int, int], color: np.ndarray) -> np.ndarray:
    """Return an (h, w, 3) float picture of ``color``: noise of four octaves, light, grain."""
    height, width = size
    value = np.zeros(size, np.float32)
    for octave in range(4):
        cells = 3 * 2**octave
        grid = Image.fromarray(rng.random((cells, cells), np.float32) - 0.5)
        value += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    slope_y, slope_x = rng.uniform(-0.4, 0.4, 2)
    value += slope_y * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    value += slope_x * np.linspace(-1, 1, width, dtype=np.float32)
    grain = 4 * rng.standard_normal((height, width, 3), np.float32)
    return color.astype(np.float32) * (1 + 0.5 * value[..., None]) + grain


def _outline(rng: np.random.Generator, center: tuple[float, float], radius: float) -> list[float]:
    """Return a star-shaped polygon [x0, y0, x1, y1, …] around (x, y) ``center``."""
    corners = int(rng.integers(5, 14))
    angles = np.sort(rng.random(corners)) * 2 * np.pi
    # Evenly spaced angles with a jitter: random ones alone may leave half the circle empty.
    angles = (angles + np.arange(corners) * 2 * np.pi / corners) / 2
    radii = radius * rng.uniform(0.6, 1.0, corners)
    points = np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], 1)
    return points.round(2).ravel().tolist()


def _mask(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    canvas = Image.new('1', (size[1], size[0]))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return np.asarray(canvas)


def _paint(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, label: int) -> None:
    """Fill ``mask`` of ``picture`` with the texture of ``label``, in place."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = mask[box]
    picture[box][inside] = _texture(rng, inside.shape, _class_color(label))[inside]


def _clip(polygon: list[float], size: tuple[int, int]) -> list[float]:
    points = np.array(polygon).reshape(-1, 2)
    return np.clip(points, 0, [size[1], size[0]]).ravel().tolist()


def _photo_size(rng: np.random.Generator, long_side: int) -> tuple[int, int]:
    """Return (height, width): ``long_side`` and a short side, upright one time in three."""
    short_side = max(1, round(long_side * rng.choice([0.667, 0.75, 0.664, 0.8])))
    return (long_side, short_side) if rng.random() < 1 / 3 else (short_side, long_side)


def _save_jpeg(picture: np.ndarray, path: Path, gray: bool = False) -> None:
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    (image.convert('L') if gray else image).save(path, format='JPEG', quality=90)


def _uncompressed_rle(mask: np.ndarray) -> dict:
    """Return COCO's form of a crowd region: run lengths in column-major order, zeros first."""
    flat = np.concatenate([[0], mask.ravel(order='F').astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
    # A mask that reaches the last pixel ends in a run of ones: no zeros follow.
    return {
        'counts': runs[: len(runs) - (runs[-1] == 0)].tolist(),
        'size': [int(side) for side in mask.shape],
    }


Progress = Callable[[int, int, str], None]


def _quiet(done: int, total: int, what: str) -> None:
    del done, total, what


def _progress_bar(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        filled = 30 * done // total
        end = '\n' if done == total else ''
        bar = '#' * filled + '.' * (30 - filled)
        print(f'\r{what:<18} [{bar}] {done}/{total}', end=end, file=sys.stderr, flush=True)
    elif done == total:
        print(f'{what}: {total} images', file=sys.stderr, flush=True)


@contextmanager
def _new_dataset(root: Path, force: bool) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``root`` only when it is complete.

    Raises:
        FileExistsError: ``root`` holds something, and either ``force`` is not set or what is there
            was not made by this script (a real data set is never deleted).
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not force:
            raise FileExistsError(f'{root} exists; give --force to generate it anew')
        if not (root / MARKER).is_file():
            raise FileExistsError(
                f'{root} was not generated by this script (it has no {MARKER}); '
                'it is left alone even with --force'
            )
    partial = root.with_name(f'.{root.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / MARKER).write_text('Generated by make_miniature_data.py; not the real data set.\n')
    try:
        yield partial
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_imagenet(
    root: str | Path,
    train_images: int = 1000,
    val_images: int = 1000,
    *,
    long_side: int = 500,
    flat_val: bool = False,
    force: bool = False,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Path:
    """Write a miniature ImageNet-1K with all 1,000 class folders.

    Args:
        root: Folder to create, e.g. ``data/imagenet``.
        train_images: Number of training images, spread evenly over the classes. Below 1,000 some
            class folders stay empty.
        val_images: Number of validation images.
        long_side: Longer side of the images in pixels.
        flat_val: Put the validation images into ``val/`` itself, as the original archive does,
            instead of into class folders; only ``meta/val.txt`` then has the labels.
        force: Replace an earlier miniature.
        seed: Seed of the pictures.
        progress: Called with (done, total, what) after each image.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` is there already, see ``force``.
    """
    root = Path(root)
    wnids = imagenet_wnids()
    with _new_dataset(root, force) as folder:
        (folder / 'meta').mkdir()
        for split, count in (('train', train_images), ('val', val_images)):
            (folder / split).mkdir()
            if split == 'train' or not flat_val:
                for wnid in wnids:
                    (folder / split / wnid).mkdir()
            lines = []
            for index in range(count):
                label = index * len(wnids) // count if count < len(wnids) else index % len(wnids)
                if split == 'train':
                    name = f'{wnids[label]}/{wnids[label]}_{index + 1}.JPEG'
                else:
                    name = f'ILSVRC2012_val_{index + 1:08d}.JPEG'
                    name = name if flat_val else f'{wnids[label]}/{name}'
                rng = _rng(seed, f'imagenet/{split}/{name}')
                size = _photo_size(rng, long_side)
                picture = _texture(rng, size, _class_color(int(rng.integers(1000))))
                center = (size[1] * rng.uniform(0.35, 0.65), size[0] * rng.uniform(0.35, 0.65))
                mask = _mask([_outline(rng, center, 0.45 * min(size))], size)
                _paint(rng, picture, mask, label)
                # Some of ImageNet's photographs are grey.
                _save_jpeg(picture, folder / split / name, gray=index % 50 == 1)
                lines.append(f'{name} {label}\n')
                progress(index + 1, count, f'imagenet/{split}')
            (folder / 'meta' / f'{split}.txt').write_text(''.join(lines))
    return root


def make_coco(
    root: str | Path,
    train_images: int = 64,
    val_images: int = 16,
    *,
    long_side: int = 640,
    force: bool = False,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Path:
    """Write a miniature COCO 2017 with boxes, polygons and crowd regions.

    Every eighth image has no object, as about one in a hundred of the real ones; every fourth has
    a crowd region as well.

    Args:
        root: Folder to create, e.g. ``data/coco``.
        train_images: Number of training images.
        val_images: Number of validation images.
        long_side: Longer side of the images in pixels.
        force: Replace an earlier miniature.
        seed: Seed of the pictures.
        progress: Called with (done, total, what) after each image.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` is there already, see ``force``.
    """
    root = Path(root)
    categories = coco_categories()
    with _new_dataset(root, force) as folder:
        (folder / 'annotations').mkdir()
        next_id = 1
        for split, count in (('train2017', train_images), ('val2017', val_images)):
            (folder / split).mkdir()
            images, annotations = [], []
            for index in range(count):
                image_id = 9 + 139 * index + (7 if split == 'val2017' else 0)
                name = f'{image_id:012d}.jpg'
                rng = _rng(seed, f'coco/{split}/{name}')
                size = _photo_size(rng, long_side)
                picture = _texture(rng, size, _class_color(int(rng.integers(1000))))
                objects = 0 if index % 8 == 7 else int(rng.integers(2, 8))
                for _ in range(objects):
                    picked = int(rng.integers(len(categories)))
                    polygons = _coco_object(rng, size)
                    mask = _mask(polygons, size)
                    _paint(rng, picture, mask, picked)
                    points = np.concatenate([np.array(p).reshape(-1, 2) for p in polygons])
                    low, high = points.min(0), points.max(0)
                    annotations.append(
                        {
                            'segmentation': polygons,
                            'area': float(mask.sum()),
                            'iscrowd': 0,
                            'image_id': image_id,
                            'bbox': [*low.round(2).tolist(), *(high - low).round(2).tolist()],
                            'category_id': categories[picked]['id'],
                            'id': next_id,
                        }
                    )
                    next_id += 1
                if objects and index % 4 == 0:
                    crowd = _crowd(rng, size)
                    _paint(rng, picture, crowd, 0)
                    rows, columns = np.flatnonzero(crowd.any(1)), np.flatnonzero(crowd.any(0))
                    top, left = int(rows[0]), int(columns[0])
                    annotations.append(
                        {
                            'segmentation': _uncompressed_rle(crowd),
                            'area': int(crowd.sum()),
                            'iscrowd': 1,
                            'image_id': image_id,
                            'bbox': [
                                left,
                                top,
                                int(columns[-1]) - left + 1,
                                int(rows[-1]) - top + 1,
                            ],
                            'category_id': 1,
                            'id': 900100000000 + next_id,
                        }
                    )
                    next_id += 1
                images.append(
                    {
                        'license': 1,
                        'file_name': name,
                        'coco_url': '',
                        'height': size[0],
                        'width': size[1],
                        'date_captured': '2013-11-14 11:18:45',
                        'flickr_url': '',
                        'id': image_id,
                    }
                )
                _save_jpeg(picture, folder / split / name, gray=index % 16 == 3)
                progress(index + 1, count, f'coco/{split}')
            content = {
                'info': {'description': 'Miniature in the layout of COCO 2017', 'year': 2017},
                'licenses': [{'url': '', 'id': 1, 'name': 'generated'}],
                'images': images,
                'annotations': annotations,
                'categories': categories,
            }
            (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


def _coco_object(rng: np.random.Generator, size: tuple[int, int]) -> list[list[float]]:
    """Return the polygons of one object; one in five is cut in two, as by an occlusion."""
    height, width = size
    radius = min(size) * float(np.exp(rng.uniform(np.log(0.06), np.log(0.4))))
    center = (rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height)
    polygons = [_outline(rng, center, radius)]
    if rng.random() < 0.2:
        polygons.append(_outline(rng, (center[0] + 1.5 * radius, center[1]), 0.5 * radius))
    # The second part lies to the right and would leave the picture from the right half.
    return [_clip(polygon, size) for polygon in polygons[: 1 if center[0] > width / 2 else 2]]


def _crowd(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    row = rng.uniform(0.3, 0.7) * height
    step = max(3, width // 24)
    heads = [_outline(rng, (x, row), 0.7 * step) for x in range(width // 4, 3 * width // 4, step)]
    return _mask(heads, size)


def make_ade20k(
    root: str | Path,
    train_images: int = 64,
    val_images: int = 16,
    *,
    long_side: int = 683,
    force: bool = False,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Path:
    """Write a miniature of the scene parsing challenge's ADE20K.

    Label maps are 8-bit PNG files with 0 for what belongs to no class and 1…150 for the classes.

    Args:
        root: Folder to create, e.g. ``data/ade/ADEChallengeData2016``.
        train_images: Number of training images.
        val_images: Number of validation images.
        long_side: Longer side of the images in pixels.
        force: Replace an earlier miniature.
        seed: Seed of the pictures.
        progress: Called with (done, total, what) after each image.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` is there already, see ``force``.
    """
    root = Path(root)
    splits = (('training', 'train', train_images), ('validation', 'val', val_images))
    with _new_dataset(root, force) as folder:
        for split, stem, count in splits:
            for kind in ('images', 'annotations'):
                (folder / kind / split).mkdir(parents=True)
            for index in range(count):
                name = f'ADE_{stem}_{index + 1:08d}'
                rng = _rng(seed, f'ade/{name}')
                size = _photo_size(rng, long_side)
                picture, labels = _scene(rng, size)
                _save_jpeg(picture, folder / 'images' / split / f'{name}.jpg')
                Image.fromarray(labels).save(folder / 'annotations' / split / f'{name}.png')
                progress(index + 1, count, f'ade/{split}')
    return root


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture and its label map: two grounds, objects on them, an unlabelled patch."""
    height, width = size
    labels = np.empty(size, np.uint8)
    horizon = round(height * rng.uniform(0.4, 0.6))
    labels[:horizon], labels[horizon:] = rng.choice(np.arange(1, 16), 2, replace=False)
    for label in [*rng.integers(1, ADE_CLASSES + 1, int(rng.integers(3, 9))), 0]:
        center = (rng.uniform(0, 1) * width, rng.uniform(0, 1) * height)
        radius = min(size) * float(np.exp(rng.uniform(np.log(0.05), np.log(0.35))))
        labels[_mask([_outline(rng, center, radius)], size)] = label
    picture = np.empty((*size, 3), np.float32)
    for label in np.unique(labels):
        _paint(rng, picture, labels == label, int(label))
    return picture, labels


def _clip_of(rng: np.random.Generator, label: int, long_side: int, frames: int) -> np.ndarray:
    """Return (frames, h, w, 3) uint8: a shape of the label's texture that moves over a ground."""
    height, width = (side // 2 * 2 for side in _photo_size(rng, long_side))
    ground = _texture(rng, (height, width), _class_color(int(rng.integers(1000))))
    radius = 0.25 * min(height, width)
    figure = _texture(rng, (height, width), _class_color(label))
    start, way = rng.uniform(0.3, 0.7, 2), rng.uniform(-0.4, 0.4, 2)
    outline = np.array(_outline(rng, (0, 0), radius)).reshape(-1, 2)
    pictures = []
    for time in np.linspace(-0.5, 0.5, frames):
        place = (start + time * way) * (width, height)
        mask = _mask([(outline + place).ravel().tolist()], (height, width))
        pictures.append(np.where(mask[..., None], figure, ground))
    return np.stack(pictures).clip(0, 255).astype(np.uint8)


def _save_video(clip: np.ndarray, path: Path, codec: str, rate: int) -> None:
    try:
        import av
    except ImportError as error:
        raise OSError('videos need PyAV, which is not installed: pip install av') from error
    # WebM files have a random identifier otherwise.
    with av.open(str(path), 'w', options={'fflags': '+bitexact'}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt, stream.bit_rate = 'yuv420p', 1_000_000
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode())


def make_kinetics400(
    root: str | Path,
    train_images: int = 16,
    val_images: int = 8,
    *,
    long_side: int = 340,
    force: bool = False,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Path:
    """Write a miniature Kinetics-400: official lists of all 400 classes, a few of the videos.

    As with the real data, whose videos vanish from where they were published, the lists name more
    videos than there are.

    Args:
        root: Folder to create, e.g. ``data/kinetics400``.
        train_images: Number of training videos.
        val_images: Number of validation videos.
        long_side: Longer side of the videos in pixels.
        force: Replace an earlier miniature.
        seed: Seed of the pictures.
        progress: Called with (done, total, what) after each video.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` is there already, see ``force``.
        OSError: PyAV is not installed.
    """
    root = Path(root)
    classes = _lines('kinetics400_classes.txt')
    letters = np.array(list('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'))
    with _new_dataset(root, force) as folder:
        (folder / 'annotations').mkdir()
        for split, count in (('train', train_images), ('val', val_images)):
            rows = []
            # Every class has one video in the list, and the first ones spread over the classes.
            for index in range(max(count, len(classes))):
                there = index < count
                label = index % len(classes) if count >= len(classes) else index
                rng = _rng(seed, f'kinetics400/{split}/{index}')
                name = ''.join(rng.choice(letters, 11))
                begin = int(rng.integers(0, 200))
                rows.append([classes[label], name, begin, begin + 10, split])
                if there:
                    place = folder / f'videos_{split}' / classes[label]
                    place.mkdir(parents=True, exist_ok=True)
                    frames = int(rng.integers(20, 40))
                    clip = _clip_of(rng, label, long_side, frames)
                    file = place / f'{name}_{begin:06d}_{begin + 10:06d}.mp4'
                    _save_video(clip, file, 'mpeg4', int(rng.choice([25, 30])))
                    progress(index + 1, count, f'kinetics400/{split}')
            with open(folder / f'annotations/kinetics_{split}.csv', 'w', newline='') as file:
                table = csv.writer(file)
                table.writerow(['label', 'youtube_id', 'time_start', 'time_end', 'split'])
                table.writerows(rows)
    return root


def make_sthv2(
    root: str | Path,
    train_images: int = 16,
    val_images: int = 8,
    *,
    long_side: int = 427,
    force: bool = False,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Path:
    """Write a miniature Something-Something V2: WebM files and the official JSON lists.

    Args:
        root: Folder to create, e.g. ``data/sthv2``.
        train_images: Number of training videos.
        val_images: Number of validation videos.
        long_side: Longer side of the videos in pixels.
        force: Replace an earlier miniature.
        seed: Seed of the pictures.
        progress: Called with (done, total, what) after each video.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` is there already, see ``force``.
        OSError: PyAV is not installed.
    """
    root = Path(root)
    classes = _lines('sthv2_classes.txt')
    objects = ['a cup', 'a red book', 'my phone', 'two pens', 'a shoe']
    with _new_dataset(root, force) as folder:
        (folder / 'annotations').mkdir()
        (folder / 'videos').mkdir()
        identifier = 1
        for split, count in (('train', train_images), ('validation', val_images)):
            entries = []
            for index in range(count):
                label = index * len(classes) // count if count < len(classes) else index
                label %= len(classes)
                rng = _rng(seed, f'sthv2/{split}/{index}')
                identifier += int(rng.integers(1, 50))
                words, things, named = classes[label].split('something'), [], ''
                template = '[something]'.join(words)
                for i, word in enumerate(words):
                    named += word
                    if i < len(words) - 1:
                        things.append(str(rng.choice(objects)))
                        named += things[-1]
                entry = {'id': str(identifier), 'label': named.lower(), 'template': template}
                entries.append({**entry, 'placeholders': things})
                clip = _clip_of(rng, label, long_side, int(rng.integers(20, 40)))
                _save_video(clip, folder / f'videos/{identifier}.webm', 'libvpx-vp9', 12)
                progress(index + 1, count, f'sthv2/{split}')
            file = folder / f'annotations/something-something-v2-{split}.json'
            file.write_text(json.dumps(entries))
        labels = {name: str(number) for number, name in enumerate(classes)}
        file = folder / 'annotations/something-something-v2-labels.json'
        file.write_text(json.dumps(labels))
    return root


def make_video_list(
    root: str | Path,
    train_images: int = 16,
    val_images: int = 8,
    *,
    classes: int,
    long_side: int = 340,
    force: bool = False,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Path:
    """Write videos, and lists of their paths and labels, as VideoMamba reads Breakfast and COIN.

    Arguments are those of :func:`make_kinetics400`, and:

    Args:
        classes: Number of classes, over which the labels spread.
    """
    root = Path(root)
    with _new_dataset(root, force) as folder:
        (folder / 'annotations').mkdir()
        (folder / 'videos').mkdir()
        for split, count in (('train', train_images), ('val', val_images)):
            lines = []
            for index in range(count):
                rng = _rng(seed, f'{classes} classes/{split}/{index}')
                label = index * classes // count if count < classes else index % classes
                clip = _clip_of(rng, label, long_side, int(rng.integers(20, 40)))
                _save_video(clip, folder / f'videos/{split}_{index}.mp4', 'mpeg4', 25)
                lines.append(f'{split}_{index}.mp4,{label}\n')
                progress(index + 1, count, f'{root.name}/{split}')
            (folder / f'annotations/{split}.csv').write_text(''.join(lines))
    return root


DATASETS = {
    'imagenet': (make_imagenet, 'imagenet'),
    'coco': (make_coco, 'coco'),
    'ade20k': (make_ade20k, 'ade/ADEChallengeData2016'),
    'kinetics400': (make_kinetics400, 'kinetics400'),
    'sthv2': (make_sthv2, 'sthv2'),
    'breakfast': (partial(make_video_list, classes=10), 'breakfast'),
    'coin': (partial(make_video_list, classes=180), 'coin'),
}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='folder that receives the data sets'
    )
    parser.add_argument('--only', nargs='+', choices=DATASETS, default=list(DATASETS))
    parser.add_argument(
        '--images',
        type=_positive,
        help='images or videos per split (default: 1000 for imagenet, 16 and 8 videos, else 64 to '
        'train and 16 to validate)',
    )
    parser.add_argument(
        '--long-side', type=_positive, help='longer side in pixels (default: as the real data)'
    )
    parser.add_argument(
        '--flat-val', action='store_true', help='imagenet: validation images without class folders'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the pictures (default: 0)')
    parser.add_argument('--force', action='store_true', help='replace miniatures made earlier')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_args(argv)
    for name in args.only:
        make, where = DATASETS[name]
        options = {'force': args.force, 'seed': args.seed, 'progress': _progress_bar}
        if args.images is not None:
            options.update(train_images=args.images, val_images=args.images)
        if args.long_side is not None:
            options['long_side'] = args.long_side
        if name == 'imagenet':
            options['flat_val'] = args.flat_val
        try:
            root = make(args.out / where, **options)
        except OSError as error:
            print(f'error: {error}', file=sys.stderr)
            return 1
        print(root)
    return 0


if __name__ == '__main__':
    sys.exit(main())
