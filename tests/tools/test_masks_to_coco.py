"""PNG masks to COCO JSON."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO


@pytest.fixture(scope='module')
def script(load_script):
    return load_script('converters/masks_to_coco.py')


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    for name in ('a.jpg', 'b.png'):
        Image.new('RGB', (12, 8)).save(folder / name)
    return folder


def numbers() -> np.ndarray:
    """Two instances, one of them beyond 8 bits."""
    values = np.zeros((8, 12), np.uint16)
    values[1:4, 2:7] = 1
    values[5:8, 8:12] = 300
    return values


def save(path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def boxes(written) -> list:
    return [(a['image_id'], a['category_id'], a['bbox'], a['area']) for a in written['annotations']]


EXPECTED = [(1, 1, [2, 1, 5, 3], 15), (1, 1, [8, 5, 4, 3], 12)]


def test_numbers(script, images, tmp_path, capsys):
    save(tmp_path / 'masks' / 'a.png', numbers())
    out = tmp_path / 'new' / 'train.json'
    assert script.main([str(images), str(tmp_path / 'masks'), str(out), '--classes', 'cell']) == 0
    assert '2 images, 1 of them with instances' in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert boxes(written) == EXPECTED
    assert [i['file_name'] for i in written['images']] == ['a.jpg', 'b.png']
    coco = COCO(str(out))
    for entry, value in zip(coco.anns.values(), (1, 300), strict=True):
        assert np.array_equal(coco.annToMask(entry), numbers() == value)


def test_palette_keeps_its_indices(script, images, tmp_path):
    picture = Image.fromarray(np.minimum(numbers(), 2).astype(np.uint8), 'P')
    picture.putpalette([0, 0, 0, 9, 9, 9, 9, 9, 9] + [0] * 759)
    (tmp_path / 'masks').mkdir()
    picture.save(tmp_path / 'masks' / 'a.png')
    assert boxes(script.convert(images, tmp_path / 'masks', ['cell'])) == EXPECTED


def test_a_file_an_instance_may_overlap(script, images, tmp_path):
    first = (numbers() == 1).astype(np.uint8) * 255
    second = np.full_like(first, 255)
    save(tmp_path / 'masks' / 'b' / '1.png', first)
    save(tmp_path / 'masks' / 'b' / '2.png', second)
    written = script.convert(images, tmp_path / 'masks', ['nucleus'])
    assert boxes(written) == [(2, 1, [2, 1, 5, 3], 15), (2, 1, [0, 0, 12, 8], 96)]
    assert masks.area(written['annotations'][1]['segmentation']) == 96


def test_folders_of_classes(script, images, tmp_path):
    save(tmp_path / 'masks' / 'dog' / 'a.png', (numbers() == 1).astype(np.uint8))
    save(tmp_path / 'masks' / 'cat' / 'a.png', (numbers() == 300).astype(np.uint8))
    written = script.convert(images, tmp_path / 'masks', ['cat', 'dog'])
    assert boxes(written) == [(1, 1, [8, 5, 4, 3], 12), (1, 2, [2, 1, 5, 3], 15)]
    assert written['categories'] == [dict(id=1, name='cat'), dict(id=2, name='dog')]


def test_small_ones_are_left_out(script, images, tmp_path):
    save(tmp_path / 'masks' / 'a.png', numbers())
    written = script.convert(images, tmp_path / 'masks', ['cell'], min_area=13)
    assert boxes(written) == EXPECTED[:1]


def test_size_is_that_of_the_turned_photograph(script, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (8, 12)).save(folder / 'a.jpg', exif=exif)
    save(tmp_path / 'masks' / 'a.png', numbers())
    assert boxes(script.convert(folder, tmp_path / 'masks', ['cell'])) == EXPECTED


def other_size(masks_folder):
    save(masks_folder / 'a.png', numbers()[:5])


def stranger(masks_folder):
    save(masks_folder / 'c.png', numbers())


def colours(masks_folder):
    save(masks_folder / 'a.png', np.zeros((8, 12, 3), np.uint8))


def broken(masks_folder):
    masks_folder.mkdir()
    (masks_folder / 'a.png').write_bytes(b'no picture')


def empty(masks_folder):
    masks_folder.mkdir()


@pytest.mark.parametrize(('make', 'classes', 'message'), [
    (other_size, ['x'], r'a\.png is 12x5, its image .*a\.jpg is 12x8'),
    (stranger, ['x'], r"masks of 1 images that do not exist, the first of 'c'"),
    (colours, ['x'], r'a\.png must have one channel, not the shape \(8, 12, 3\)'),
    (broken, ['x'], r'a\.png cannot be read'),
    (empty, ['x'], 'has neither PNG files nor folders'),
    (stranger, ['x', 'y'], r'must have a folder of masks for each class \(x, y\), found none'),
    (empty, ['x', 'x'], 'names one class twice'),
    (lambda folder: None, ['x'], 'masks is not a folder'),
])  # fmt: skip
def test_bad_input(script, images, tmp_path, make, classes, message):
    from mmvim.errors import UserError

    make(tmp_path / 'masks')
    with pytest.raises(UserError, match=message):
        script.convert(images, tmp_path / 'masks', classes)


def test_no_images(script, tmp_path):
    from mmvim.errors import UserError

    with pytest.raises(UserError, match='has no images'):
        script.convert(tmp_path / 'none', tmp_path, ['x'])
