"""Writers of the splits: class folders, COCO JSON, ADE20K-style label maps."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .digits import DIGIT_CLASSES, load_digits
from .errors import require
from .scenes import SCENE_SIZE, Scene, SceneGenerator

#: Segmentation classes after ``reduce_zero_label``: label map value minus one.
SEG_CLASSES: tuple[str, ...] = ('background', *DIGIT_CLASSES)
SEG_PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
)

#: The folder name of each split in an ADE20K-style tree; ADE20K itself has no labelled test split.
ADE_FOLDERS: dict[str, str] = {'train': 'training', 'val': 'validation', 'test': 'test'}

CLS_IMAGE_SIZE = 32  # pixels
_JPEG_QUALITY = 95


def write_cls(root: Path, sizes: Mapping[str, int]) -> Iterator[None]:
    """Write ``root/{train,val,test}/<class>/<index>.png``, 32x32 grey, white ink on black.

    Args:
        root: an existing, empty folder.
        sizes: split name to number of digits; the first ones are written.

    Yields:
        After each file.
    """
    image_module = require('PIL.Image')
    splits = load_digits()
    for name, size in sizes.items():
        for label in DIGIT_CLASSES:
            (root / name / label).mkdir(parents=True)
        for digit, label, index in zip(*(part[:size] for part in splits[name]), strict=True):
            image = image_module.fromarray(np.rint(digit * 255).astype(np.uint8))
            image = image.resize((CLS_IMAGE_SIZE,) * 2, image_module.Resampling.BICUBIC)
            image.save(root / name / DIGIT_CLASSES[label] / f'{index:04d}.png')
            yield


def write_det(root: Path, sizes: Mapping[str, int]) -> Iterator[None]:
    """Write ``root/{train,val,test}/*.jpg`` and ``root/annotations/instances_<split>.json``.

    The JSON is COCO's: images, categories ('0'-'9' with ids 1-10), and annotations with bbox, area,
    polygon segmentation and iscrowd.

    Args:
        root: an existing, empty folder.
        sizes: split name to number of scenes.

    Yields:
        After each file.
    """
    (root / 'annotations').mkdir(parents=True)
    for split, count in sizes.items():
        (root / split).mkdir()
        generate = SceneGenerator(split)
        images, annotations = [], []
        for index in range(count):
            scene = generate(index)
            name = f'{index + 1:012d}.jpg'
            _save_jpeg(scene.image, root / split / name)
            images.append(
                {'id': index + 1, 'file_name': name, 'width': SCENE_SIZE, 'height': SCENE_SIZE}
            )
            for digit in scene.digits:
                x1, y1, x2, y2 = digit.box
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': index + 1,
                        'category_id': digit.label + 1,
                        'bbox': [x1, y1, x2 - x1, y2 - y1],
                        'area': int((digit.alpha >= 0.5).sum()),
                        'segmentation': _polygons(digit.alpha, x1, y1),
                        'iscrowd': 0,
                    }
                )
            yield
        content = {
            'info': {
                'description': "scikit-learn's handwritten digits on scikit-image's photographs",
                'version': '1.0',
            },
            'licenses': [],
            'images': images,
            'annotations': annotations,
            'categories': [
                {'id': i + 1, 'name': name, 'supercategory': 'digit'}
                for i, name in enumerate(DIGIT_CLASSES)
            ],
        }
        with open(root / 'annotations' / f'instances_{split}.json', 'w') as file:
            json.dump(content, file)
        yield


def write_seg(root: Path, sizes: Mapping[str, int]) -> Iterator[None]:
    """Write ``root/{images,annotations}/{training,validation,test}/*``.

    Label maps follow ADE20K: 0 is unlabelled and ignored (``reduce_zero_label=True`` turns it into
    255), here the blended rim of each stroke, where neither answer is right. 1 is background and
    2-11 are the digits '0'-'9'.

    Args:
        root: an existing, empty folder.
        sizes: split name to number of scenes.

    Yields:
        After each file.
    """
    image_module = require('PIL.Image')
    for split, count in sizes.items():
        images = root / 'images' / ADE_FOLDERS[split]
        annotations = root / 'annotations' / ADE_FOLDERS[split]
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        generate = SceneGenerator(split)
        for index in range(count):
            scene = generate(index)
            name = f'digits_{split}_{index + 1:08d}'
            _save_jpeg(scene.image, images / f'{name}.jpg')
            yield
            image_module.fromarray(label_map(scene)).save(annotations / f'{name}.png')
            yield


def label_map(scene: Scene) -> np.ndarray:
    """(h, w) uint8: 0 rim, 1 background, 2-11 digits."""
    out = np.ones(scene.alpha.shape, np.uint8)
    out[scene.alpha > 0] = 0
    inside = scene.alpha >= 0.75
    out[inside] = scene.labels[inside] + 2
    return out


def _polygons(alpha: np.ndarray, x: int, y: int) -> list[list[float]]:
    """COCO polygons of ``alpha >= 0.5``; holes are filled, as in COCO's own polygons."""
    measure = require('skimage.measure')
    polygons = []
    for contour in measure.find_contours(np.pad(alpha, 1), 0.5):
        # Pixel centres lie at half coordinates in COCO; the padding shifts by one.
        points = contour[:-1, ::-1] - 0.5 + (x, y)
        if len(points) >= 3 and _signed_area(points) > 0:
            polygons.append([round(float(v), 2) for v in points.ravel()])
    return polygons


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)


def _save_jpeg(image: np.ndarray, path: Path) -> None:
    # 4:4:4, since coloured strokes two pixels wide suffer from halved chroma.
    picture = require('PIL.Image').fromarray(image)
    picture.save(path, quality=_JPEG_QUALITY, subsampling=0)
