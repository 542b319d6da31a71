"""Miniatures of the layouts that docs/user_guides/custom_data.md describes."""

import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

CLASSES = ('cat', 'dog')
SIZE = 96


def picture(seed: int) -> Image.Image:
    """A photograph's stand-in: a bright rectangle on noise."""
    values = np.random.default_rng(seed).integers(0, 120, (SIZE, SIZE, 3), np.uint8)
    values[20:60, 30:70] = 230
    return Image.fromarray(values)


def files(root: Path, *suffix: str) -> Iterator[tuple[int, str, Path]]:
    """Number, split and path of two pictures a split, which are written."""
    for i, split in enumerate(('train', 'train', 'val', 'val')):
        path = root.joinpath(*suffix) / f'{split}_{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
        yield i, split, path


def images(root: Path) -> None:
    """Class folders."""
    for i, split in enumerate(('train', 'val')):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            picture(i).save(folder / '1.jpg')


def coco(root: Path) -> None:
    """Two JSON files beside a folder of pictures."""
    made = {'train': [], 'val': []}
    for i, split, path in files(root, 'images'):
        made[split].append((i, path.name))
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    for split, found in made.items():
        polygon = [30, 20, 70, 20, 70, 60, 30, 60]
        annotations = [
            dict(id=i + 1, image_id=i, category_id=1 + i % 2, iscrowd=0, area=1600,
                 bbox=[30, 20, 40, 40], segmentation=[polygon])
            for i, _ in found
        ]  # fmt: skip
        described = [dict(id=i, file_name=name, width=SIZE, height=SIZE) for i, name in found]
        text = json.dumps(dict(images=described, annotations=annotations, categories=categories))
        (root / f'{split}.json').write_text(text)


def voc(root: Path, classes: tuple[str, ...] = CLASSES) -> None:
    """Pascal VOC's folders."""
    lists = root / 'ImageSets' / 'Main'
    lists.mkdir(parents=True)
    (root / 'Annotations').mkdir()
    (lists / 'test.txt').write_text('val_2\nval_3\n')
    for i, split, path in files(root, 'JPEGImages'):
        with (lists / f'{split}.txt').open('a') as file:
            file.write(f'{path.stem}\n')
        (root / 'Annotations' / f'{path.stem}.xml').write_text(
            f'<annotation><filename>{path.name}</filename>'
            f'<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>'
            f'<object><name>{classes[i % 2]}</name><difficult>0</difficult><bndbox>'
            '<xmin>30</xmin><ymin>20</ymin><xmax>70</xmax><ymax>60</ymax></bndbox></object>'
            '</annotation>'
        )


def blood_cells(root: Path) -> None:
    """The folders and classes of the BCCD photographs."""
    voc(root, ('RBC', 'WBC'))


def segmentation(root: Path) -> None:
    """Pictures and maps of indices, a strip of which is to be ignored."""
    for split in ('train', 'val'):
        for i, _, path in files(root, 'images', split):
            values = np.zeros((SIZE, SIZE), np.uint8)
            values[20:60, 30:70] = 1 + i % 2
            values[:5] = 255
            mask = root / 'masks' / split / f'{path.stem}.png'
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(mask)


def lists(root: Path, names: dict[str, list[str]]) -> None:
    """The lists and class names of a video data set."""
    (root / 'classes.txt').write_text('\n'.join(CLASSES))
    for split, found in names.items():
        text = ''.join(f'{name} {i % 2}\n' for i, name in enumerate(found))
        (root / f'{split}.csv').write_text(text)


def videos(root: Path) -> None:
    """Files and lists."""
    root.mkdir(parents=True)
    names = {split: [f'{split}_{i}.mp4' for i in range(2)] for split in ('train', 'val')}
    lists(root, names)
    for name in (*names['train'], *names['val']):
        with av.open(str(root / name), 'w') as container:
            stream = container.add_stream('mpeg4', rate=8)
            stream.width = stream.height = SIZE
            stream.pix_fmt = 'yuv420p'
            for i in range(8):
                frame = av.VideoFrame.from_ndarray(np.asarray(picture(i)), format='rgb24')
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def frames(root: Path) -> None:
    """Folders of frames and lists."""
    names = {split: [f'{split}_{i}' for i in range(2)] for split in ('train', 'val')}
    for name in (*names['train'], *names['val']):
        (root / name).mkdir(parents=True)
        for i in range(8):
            picture(i).save(root / name / f'img_{i + 1:05}.jpg')
    lists(root, names)
