#!/usr/bin/env python
"""Write instance masks in PNG files as the COCO JSON that detectors read.

    python tools/converters/masks_to_coco.py IMAGES MASKS train.json --classes nucleus

One of three layouts, which is told by what lies in MASKS (STEM is the name of an image without its
suffix):

    MASKS/STEM.png          every pixel holds the number of its instance, 0 is background; 8 or 16
                            bits, or a palette; one class
    MASKS/STEM/*.png        a file an instance, not 0 inside; one class
    MASKS/CLASS/STEM.png    the first layout for each of several classes

An image may lack a file of masks: it has no instances. Masks of which there is no image are an
error, as is a size other than the image's. Instances may overlap in the second layout.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as masks

from mmvim.cli.diagnosis import reported_errors
from mmvim.errors import UserError

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def main(argv: list[str] | None = None) -> int:
    """Read, write and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', type=Path, help='folder of the images')
    parser.add_argument('masks', type=Path, help='folder of the masks')
    parser.add_argument('out', type=Path, help='JSON file to write')
    parser.add_argument('--classes', nargs='+', required=True, metavar='CLASS',
                        help='names of the classes, in their order')  # fmt: skip
    parser.add_argument('--min-area', type=int, default=1, metavar='PIXELS',
                        help='leave out smaller instances (default: 1)')  # fmt: skip
    args = parser.parse_args(argv)
    with reported_errors():
        written = convert(args.images, args.masks, args.classes, args.min_area)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(written))
    report(written, args.out)
    return 0


def convert(folder: Path, mask_folder: Path, classes: Sequence[str], min_area: int = 1) -> dict:
    """The contents of the JSON file.

    Raises:
        UserError: A folder is missing or empty, or a mask fits no image.
    """
    if len(set(classes)) < len(classes):
        raise UserError(f'--classes names one class twice: {" ".join(classes)}')
    images = image_files(folder)
    find = layout(mask_folder, images, classes)
    described, annotations = [], []
    for i, (stem, path) in enumerate(images.items(), 1):
        width, height = size(path)
        described.append(dict(id=i, file_name=path.name, width=width, height=height))
        for category, source, mask in find(stem):
            if mask.shape != (height, width):
                found = 'x'.join(map(str, mask.shape[::-1]))
                raise UserError(f'{source} is {found}, its image {path} is {width}x{height}')
            area = int(mask.sum())
            if area >= max(min_area, 1):
                annotations.append(annotation(len(annotations) + 1, i, category, mask, area))
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    return dict(images=described, annotations=annotations, categories=categories)


def image_files(folder: Path) -> dict[str, Path]:
    """Images by stem, in order."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in IMAGES:
            if path.stem in found:
                raise UserError(f'{found[path.stem]} and {path} would share their masks')
            found[path.stem] = path
    if not found:
        raise UserError(f'{folder} has no images ({" ".join(IMAGES)})')
    return found


def layout(folder: Path, images: dict[str, Path], classes: Sequence[str]):
    """The function that yields category, file and mask of each instance of an image."""
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder')
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    files = {path.stem for path in folder.glob('*.png')}
    if names and names <= set(classes):
        check_stems(
            folder, {p.stem for name in names for p in folder.glob(f'{name}/*.png')}, images
        )

        def by_class(stem: str) -> Iterator[tuple[int, Path, np.ndarray]]:
            for category, name in enumerate(classes, 1):
                path = folder / name / f'{stem}.png'
                if path.exists():
                    yield from ((category, path, mask) for mask in numbered(path))

        return by_class
    if len(classes) > 1:
        raise UserError(
            f'{folder} must have a folder of masks for each class ({", ".join(classes)}), found '
            f'{", ".join(sorted(names)[:5]) or "none"}'
        )
    check_stems(folder, names | files, images)
    if not names | files:
        raise UserError(f'{folder} has neither PNG files nor folders')

    def by_image(stem: str) -> Iterator[tuple[int, Path, np.ndarray]]:
        if stem in files:
            path = folder / f'{stem}.png'
            yield from ((1, path, mask) for mask in numbered(path))
        for path in sorted((folder / stem).glob('*.png')):
            yield 1, path, read(path) != 0

    return by_image


def check_stems(folder: Path, stems: set[str], images: dict[str, Path]) -> None:
    """Every mask belongs to an image."""
    strangers = sorted(stems - images.keys())
    if strangers:
        raise UserError(
            f'{folder} has masks of {len(strangers)} images that do not exist, the first of '
            f'{strangers[0]!r}'
        )


def numbered(path: Path) -> Iterator[np.ndarray]:
    """The mask of each instance of a file of numbers."""
    values = read(path)
    for value in np.unique(values):
        if value:
            yield values == value


def read(path: Path) -> np.ndarray:
    """(h, w) numbers; those of a palette are its indices."""
    try:
        values = np.asarray(Image.open(path))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error
    if values.ndim != 2:
        raise UserError(f'{path} must have one channel, not the shape {values.shape}')
    return values


def size(path: Path) -> tuple[int, int]:
    """Width and height of an image, as cv2 and mmcv read it: turned as its EXIF data say."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error
    return (height, width) if turned else (width, height)


def annotation(number: int, image: int, category: int, mask: np.ndarray, area: int) -> dict:
    """An entry of the JSON file, its mask as a compressed run-length code."""
    code = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        id=number,
        image_id=image,
        category_id=category,
        bbox=masks.toBbox(code).tolist(),
        area=area,
        iscrowd=0,
        segmentation=dict(size=[int(s) for s in code['size']], counts=code['counts'].decode()),
    )


def report(written: dict, out: Path) -> None:
    """Print what there is, so that a wrong folder is noticed."""
    count = Counter(a['category_id'] for a in written['annotations'])
    with_masks = len({a['image_id'] for a in written['annotations']})
    print(f'{out}: {len(written["images"])} images, {with_masks} of them with instances')
    for category in written['categories']:
        print(f'  {category["name"]}: {count[category["id"]]} instances')


if __name__ == '__main__':
    sys.exit(main())
