"""Data of one task, generated once, completely or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .digits import SPLIT_SIZES
from .errors import QuickstartDataError
from .movies import (
    MOVIE_COUNTS,
    MOVIE_DIGIT_HEIGHT,
    MOVIE_FRAMES,
    MOVIE_SIZE,
    MOVIE_SPEED,
    write_video,
)
from .scenes import (
    DIGIT_HEIGHT,
    DIGITS_PER_SCENE,
    PHOTOS,
    SCENE_COUNTS,
    SCENE_SIZE,
)
from .writers import CLS_IMAGE_SIZE, write_cls, write_det, write_seg

_VERSION = 2
_MANIFEST = 'manifest.json'
_SCENES = {
    'scene_size': SCENE_SIZE,
    'digits_per_scene': DIGITS_PER_SCENE,
    'digit_height': DIGIT_HEIGHT,
    'photos': PHOTOS,
}
_PARAMETERS = {
    'cls': {'image_size': CLS_IMAGE_SIZE},
    'det': _SCENES,
    'seg': _SCENES,
    'video': {
        'movie_size': MOVIE_SIZE,
        'frames': MOVIE_FRAMES,
        'digit_height': MOVIE_DIGIT_HEIGHT,
        'speed': MOVIE_SPEED,
    },
}
_SIZES = {'cls': SPLIT_SIZES, 'det': SCENE_COUNTS, 'seg': SCENE_COUNTS, 'video': MOVIE_COUNTS}
_WRITERS: dict[str, Callable[[Path, Mapping[str, int]], Iterator[None]]] = {
    'cls': write_cls,
    'det': write_det,
    'seg': write_seg,
    'video': write_video,
}
#: Files for each picture or movie, and lists besides.
_FILES = {'cls': (1, 0), 'det': (1, 3), 'seg': (2, 0), 'video': (1, 4)}
_NEEDED_MIB = {'cls': 16, 'det': 96, 'seg': 96, 'video': 64}

TASKS: tuple[str, ...] = tuple(_WRITERS)
#: Called with (files written, total files).
Progress = Callable[[int, int], None]


def prepare(
    task: str,
    root: str | Path,
    *,
    sizes: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> bool:
    """Write the data of ``task`` to ``root/<task>`` unless it already exists.

    The tree is built in a temporary folder next to its final place and renamed once it is complete,
    so an interrupted run leaves nothing that looks like a data set.

    Args:
        task: 'cls', 'det', 'seg' or 'video'.
        root: the folder for ``<task>/``; created if missing.
        sizes: images per split ('train', 'val', 'test'), for smaller data. Defaults to all 1,797
            digits, the scenes of ``SCENE_COUNTS``, or the movies of ``MOVIE_COUNTS``.
        progress: called with (files written, total files).
        force: generate the data again even if it is complete.

    Returns:
        Whether data was written; False if it was already complete.

    Raises:
        ValueError: unknown task or split, or more digits requested than there are.
        QuickstartDataError: a package is missing, or the folder cannot be written, is full or holds
            something else.
    """
    if task not in _WRITERS:
        raise ValueError(f'task must be one of {list(TASKS)}, got {task!r}')
    sizes = _check_sizes(task, sizes)
    root = Path(root)
    target = root / task
    wanted = json.loads(
        json.dumps({'version': _VERSION, 'task': task, 'sizes': sizes, **_PARAMETERS[task]})
    )
    if target.exists():
        found = _read_manifest(target)
        if not force and found is not None and _is_complete(target, found, wanted):
            return False
        if found is None and (not target.is_dir() or any(target.iterdir())):
            raise QuickstartDataError(
                f'{target} exists and is no quickstart data (no {_MANIFEST}): '
                'move it away or choose another folder with --out'
            )
    try:
        _build(task, root, target, sizes, wanted, progress)
    except OSError as error:
        raise QuickstartDataError(_explain(error, root)) from error
    return True


def _check_sizes(task: str, sizes: Mapping[str, int] | None) -> dict[str, int]:
    most = _SIZES[task]
    if sizes is None:
        return dict(most)
    if set(sizes) != set(most) or any(size < 1 for size in sizes.values()):
        raise ValueError(f'sizes must name {list(most)}, each at least 1, got {dict(sizes)}')
    if task == 'cls' and any(sizes[split] > most[split] for split in most):
        raise ValueError(f'sizes={dict(sizes)} is more than there are: {most}')
    return {split: int(sizes[split]) for split in most}


def _build(
    task: str,
    root: Path,
    target: Path,
    sizes: dict[str, int],
    wanted: dict,
    progress: Progress | None,
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free // 2**20
    if free < _NEEDED_MIB[task]:
        raise QuickstartDataError(
            f'{root} has {free} MiB free and the {task} data needs {_NEEDED_MIB[task]} MiB: '
            'free some space or choose another folder with --out'
        )
    partial = Path(tempfile.mkdtemp(prefix=f'.{task}-partial-', dir=root))
    try:
        tree = partial / task
        tree.mkdir()
        of_each, others = _FILES[task]
        total = of_each * sum(sizes.values()) + others
        for done, _ in enumerate(_WRITERS[task](tree, sizes), 1):
            if progress is not None:
                progress(done, total)
        with open(tree / _MANIFEST, 'w') as file:
            json.dump({**wanted, 'files': total}, file, indent=2)
        if target.exists():
            target.replace(partial / 'old')
        tree.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_manifest(target: Path) -> dict | None:
    try:
        with open(target / _MANIFEST) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _is_complete(target: Path, found: dict, wanted: dict) -> bool:
    if {k: v for k, v in found.items() if k != 'files'} != wanted:
        return False
    files = sum(len(names) for _, _, names in os.walk(target)) - 1
    return files == found['files']


def _explain(error: OSError, root: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = 'the disk is full: free some space or choose another folder with --out'
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = 'the folder cannot be written: choose another one with --out'
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        hint = 'a file is in the way: move it or choose another folder with --out'
    else:
        hint = 'nothing was left behind; choose another folder with --out if it happens again'
    return f'cannot write the quickstart data to {root} ({error}): {hint}'
