"""Moving digits: honest splits, motion that no frame gives away, files that can be read."""

import numpy as np
import pytest

pytest.importorskip('sklearn')
pytest.importorskip('av')

from mmvim.datasets.quickstart import (
    DIRECTIONS,
    MOVIE_COUNTS,
    VIDEO_CLASSES,
    MovieGenerator,
    load_digits,
    prepare,
)
from mmvim.datasets.video import VideoDataset, VideoReader


@pytest.fixture(scope='module')
def movies():
    generate = MovieGenerator('train')
    return [generate(i) for i in range(160)]


def test_each_split_has_digits_of_its_own():
    digits = load_digits()
    for split in MOVIE_COUNTS:
        generate = MovieGenerator(split)
        sources = {generate(i).source for i in range(30)}
        assert sources <= set(digits[split].indices)


def test_deterministic_and_independent_of_order(movies):
    again = MovieGenerator('train')(7)
    np.testing.assert_array_equal(again.frames, movies[7].frames)
    assert not np.array_equal(MovieGenerator('train', seed=1)(7).frames, again.frames)


def test_no_class_is_rare():
    digits = load_digits()
    for split, count in MOVIE_COUNTS.items():
        labels = digits[split].labels
        size = len(labels)
        classes = [
            int(labels[i % size]) * 4 + (i // size + i % size + int(labels[i % size])) % 4
            for i in range(count)
        ]
        share = np.bincount(classes, minlength=40) / count
        assert share.min() > 0.4 / 40, split
        assert share.max() < 2 / 40, split


def test_labels_tell_the_digit_and_the_motion(movies):
    labels = load_digits()['train'].labels
    ways = list(DIRECTIONS.values())
    for i, movie in enumerate(movies):
        assert movie.label // 4 == labels[i]
        assert VIDEO_CLASSES[movie.label].startswith(f'{labels[i]} ')
        # The shift that fits best from frame to frame, on a picture without borders.
        first, second = movie.frames[:-1].astype(float), movie.frames[1:].astype(float)
        errors = [
            np.square(np.roll(first, tuple(2 * np.array(way)), (1, 2)) - second).mean()
            for way in ways
        ]
        assert np.argmin(errors) == movie.label % 4


def test_opposite_ways_show_the_same_frames(movies):
    """The place of a digit tells nothing: in each frame it may be anywhere, whatever the way."""
    places = {way: [] for way in range(4)}
    for movie in movies:
        way = movie.label % 4
        ink = (movie.frames.astype(float) - 24).clip(0).sum(2 if way < 2 else 1)
        angle = np.exp(2j * np.pi * np.arange(32) / 32)
        places[way].append(np.angle((ink * angle).sum(1)))
    for way, angles in places.items():
        # For each frame number the mean direction on the circle is short.
        length = np.abs(np.exp(1j * np.array(angles)).mean(0))
        assert length.max() < 3 / np.sqrt(len(angles)), way


def test_files(tmp_path, movies):
    assert prepare('video', tmp_path, sizes={'train': 5, 'val': 2, 'test': 3})
    root = tmp_path / 'video'
    dataset = VideoDataset(
        'train.txt', data_root=str(root), data_prefix='train', label_file='classes.txt',
        num_classes=40,
    )  # fmt: skip
    assert dataset.CLASSES == VIDEO_CLASSES
    for i, movie in enumerate(movies[:5]):
        info = dataset.get_data_info(i)
        assert info['gt_label'] == movie.label
        with VideoReader(info['img_path']) as video:
            assert len(video) == 16
            frames = video.frames(range(16)).float().mean(1).numpy()
        assert np.abs(frames - movie.frames).mean() < 8


def test_unknown_split():
    with pytest.raises(ValueError, match='split must be one of'):
        MovieGenerator('holdout')
