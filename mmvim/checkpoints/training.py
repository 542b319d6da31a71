"""Checkpoints that training can continue from."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmvim.compat import mmengine_checkpoints

# Keys of a training run's checkpoint that a file of mere weights lacks.
_NEEDED = ('state_dict', 'optimizer', 'message_hub')


@dataclass
class Checkpoint:
    """A checkpoint that training can continue from.

    Attributes:
        path: Its path.
        iteration: Number of finished iterations.
        seed: Seed of the run; None if it is not in the file.
        shapes: Shapes of the weights, by name; empty for a directory of shards.
    """

    path: str
    iteration: int
    seed: int | None
    shapes: dict[str, tuple[int, ...]]


class BrokenCheckpoint(Exception):
    """A checkpoint that training cannot continue from; the message says why."""


def inspect(path: str, whole: bool = True) -> Checkpoint:
    """Read the description of a checkpoint, without loading its tensors.

    Args:
        path: A local file, or a directory of shards.
        whole: Whether to read the file to its end, and compare its checksums.

    Raises:
        BrokenCheckpoint: It is damaged, incomplete, or unfit for continuing training.
    """
    if os.path.isdir(path):
        return _inspect_directory(path, whole)
    if not os.path.isfile(path):
        raise BrokenCheckpoint('it does not exist')
    if os.path.getsize(path) == 0:
        raise BrokenCheckpoint('it is empty')
    content = _read(path)
    if whole:
        _check_sums(path)
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f'it holds a {type(content).__name__}, not a training run')
    meta = content.get('meta')
    missing = [key for key in _NEEDED if not isinstance(content.get(key), dict)]
    if not isinstance(meta, dict) or not {'epoch', 'iter'} <= meta.keys():
        missing.append('meta')
    if missing:
        raise BrokenCheckpoint(
            f'it holds no training run: it has no {" and no ".join(repr(key) for key in missing)}'
        )
    seed = meta.get('seed')
    return Checkpoint(
        path,
        int(meta['iter']),
        seed if isinstance(seed, int) else None,
        {
            name: tuple(value.shape)
            for name, value in content['state_dict'].items()
            if isinstance(value, torch.Tensor)
        },
    )


def candidates(work_dir: str) -> list[str]:
    """Return the checkpoints of a work directory, in the order in which they should be tried.

    The file ``last_checkpoint`` names the newest one, unless the run was killed before that file
    was written: then another one has more iterations and was written later. (One with more
    iterations that was written earlier belongs to a former run in this directory and comes last.)
    If ``last_checkpoint`` is missing or names no existing file, the newest file comes first.
    """
    directory = Path(work_dir)
    try:
        named = (directory / 'last_checkpoint').read_text().strip()
    except (OSError, UnicodeDecodeError):
        named = ''
    # A directory may have been moved or copied since; checkpoints may be in another directory.
    choices = [str(directory / os.path.basename(named)), named] if named else []
    pivot = next((path for path in choices if os.path.exists(path)), None)
    paths = [
        str(path)
        for path in (Path(pivot).parent if pivot else directory).glob('*_*')
        if re.fullmatch(r'(epoch|iter)_\d+(\.pth)?', path.name)
    ]
    if pivot is None:
        return sorted(paths, key=lambda path: (os.path.getmtime(path), _number(path)), reverse=True)
    others = [path for path in paths if os.path.abspath(path) != os.path.abspath(pivot)]
    age = _ages([pivot, *others])
    others.sort(key=lambda path: (age[path], os.path.getmtime(path)), reverse=True)
    time = os.path.getmtime(pivot)
    after = [path for path in others if age[path] > age[pivot]]
    later = [path for path in after if os.path.getmtime(path) >= time]
    former = [path for path in after if os.path.getmtime(path) < time]
    return [*later, pivot, *(path for path in others if age[path] <= age[pivot]), *former]


def _ages(paths: list[str]) -> dict[str, float]:
    """Return sort keys of checkpoints: iterations, or the numbers in their names if that is enough.

    A file that cannot be read counts as the newest if it was written last, so that it is reported.
    """
    kinds = {os.path.basename(path).partition('_')[0] for path in paths}
    if len(kinds) == 1 and kinds <= {'epoch', 'iter'}:
        return {path: _number(path) for path in paths}
    ages = {}
    for path in paths:
        try:
            ages[path] = inspect(path, whole=False).iteration
        except BrokenCheckpoint:
            ages[path] = float('inf') if path != paths[0] else -1
    return ages


def newest_first(paths: list[str], notes: list[str]) -> Iterator[Checkpoint]:
    """Yield those of ``paths`` that training can continue from, in their order.

    Args:
        paths: As :func:`candidates` returns them.
        notes: Receives a line for each one that is skipped.
    """
    for path in paths:
        try:
            yield inspect(path)
        except BrokenCheckpoint as error:
            notes.append(f'The checkpoint {path!r} is left out: {error}.')


def _inspect_directory(path: str, whole: bool) -> Checkpoint:
    shards = sorted(Path(path).glob('rank*.pth'))
    if not shards:
        if not any(Path(path).iterdir()):
            raise BrokenCheckpoint('it is an empty directory')
        # DeepSpeed and ColossalAI have their own formats and check them themselves.
        return Checkpoint(path, _number(path), None, {})
    expected = int(os.environ.get('WORLD_SIZE', len(shards)))
    if len(shards) != expected:
        raise BrokenCheckpoint(f'it has the shards of {len(shards)} processes, not of {expected}')
    for shard in shards:
        if whole:
            _check_sums(str(shard))
    meta = _read(str(shards[0])).get('meta', {})
    seed = meta.get('seed')
    return Checkpoint(path, int(meta.get('iter', 0)), seed if isinstance(seed, int) else None, {})


def _number(path: str) -> int:
    found = re.findall(r'\d+', os.path.basename(path))
    return int(found[-1]) if found else -1


def _read(path: str) -> Any:
    try:
        with mmengine_checkpoints.allowed_types(path):
            # mmap avoids reading the tensors; old files cannot be mapped.
            return torch.load(path, map_location='cpu', mmap=zipfile.is_zipfile(path))
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        text = ' '.join(str(error).split())
        text = re.sub(r"^checkpoint '.*?' (cannot be read: )?(it is )?", '', text)
        raise BrokenCheckpoint(f'it cannot be read ({text[:200]})') from error


def _check_sums(path: str) -> None:
    """Compare the checksums of everything in a file that ``torch.save`` wrote."""
    with_sums = getattr(torch.serialization, 'get_crc32_options', lambda: True)()
    if not with_sums or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise BrokenCheckpoint(f'it is damaged ({error})') from error
    if damaged is not None:
        raise BrokenCheckpoint(f'it is damaged (the checksum of {damaged} is wrong)')
