"""Safe loading of checkpoints: no code inside them runs, and resuming still works.

Why: since torch 2.6 ``torch.load`` refuses every type that is not on a list. mmengine's training
checkpoints hold its ``HistoryBuffer`` and NumPy scalars, so resuming fails with mmengine 0.10.7;
checkpoints of the official Vim and VideoMamba hold an ``argparse.Namespace``, those of VMamba a
``CfgNode`` of yacs. onedl-mmengine 0.10.12 allows some types, among them ``getattr`` without
restriction, and loads anything else with ``weights_only=False`` after a warning; downloads are
always loaded that way. Either runs whatever code the file contains.

mmengine does not read safetensors files.

How: while mmengine loads a checkpoint, the types that such files need are on torch's list, each
restricted to its legitimate use; a file that needs more is refused with a message that names the
type. Nothing else in the process is affected. ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1``, torch's own
switch for trusted files, keeps working.

A local file named ``*.safetensors`` is read with safetensors. A download fails after
:data:`TIMEOUT` seconds without an answer instead of waiting forever, and a downloaded file that is
not a checkpoint does not stay in torch's cache, where it would be found again.

Obsolete with: an mmengine that does this itself.
"""

import argparse
import collections
import contextlib
import errno
import functools
import importlib
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mmvim.errors import CheckpointError

from ._import_hook import replaces, when_imported

#: Seconds without data from a server after which a download fails.
TIMEOUT = 30.0


class RefusedCheckpoint(CheckpointError, pickle.UnpicklingError):
    """A checkpoint that is not loaded, for a reason that the user can understand."""


def install() -> None:
    """Act when ``mmengine.runner.checkpoint`` is imported."""
    when_imported('mmengine.runner.checkpoint', _patch)


def load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """``torch.load`` of a checkpoint, without running any code it contains.

    Tensors and plain containers load, and so do ``argparse.Namespace``, settings of official
    training scripts (as dicts), numbers and numeric arrays of NumPy, and mmengine's
    ``HistoryBuffer``.

    Args:
        file: Path or binary file.
        map_location: As for ``torch.load``.
        weights_only: As for ``torch.load``.

    Raises:
        pickle.UnpicklingError: The file needs another type, is damaged or is no checkpoint.
    """
    import torch

    with allowed_types(file):
        return torch.load(file, map_location=map_location, weights_only=weights_only)


def load_safetensors(file: str, map_location: Any = None) -> dict[str, Any]:
    """Read the tensors of a safetensors file, a format that mmengine does not know.

    Args:
        file: Path.
        map_location: A device; anything else means the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: safetensors is not installed.
        pickle.UnpicklingError: The file is damaged or of another kind.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"checkpoint '{file}' needs safetensors: pip install safetensors", name='safetensors'
        ) from error
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise RefusedCheckpoint(f"checkpoint '{file}' cannot be read: {error}") from error
    if map_location is None or callable(map_location) or isinstance(map_location, dict):
        return weights
    return {name: value.to(map_location) for name, value in weights.items()}


@contextlib.contextmanager
def allowed_types(file: Any) -> Iterator[None]:
    """Put the types that checkpoints need on torch's list, and explain refusals.

    Args:
        file: The file being loaded, for the message.
    """
    import torch

    known = torch.serialization.get_safe_globals()
    extra = [entry for entry in _allowed() if entry not in known]
    try:
        with torch.serialization.safe_globals(extra):
            yield
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        message = _explain(error, file)
        if message is None:
            raise
        raise RefusedCheckpoint(message) from error


def _explain(error: Exception, file: Any) -> str | None:
    """One line on why ``file`` was refused; None for an error that speaks for itself."""
    text = str(error)
    if text.startswith('checkpoint '):
        return None  # Already explained by an inner call.
    name = f"checkpoint '{file}'" if isinstance(file, str) else 'checkpoint'
    refused = re.search(r'GLOBAL (\S+) was not an allowed global', text)
    blocked = re.search(r'GLOBAL (\S+) whose module \S+ is blocked', text)
    if blocked:
        return f'{name} refused: it contains {blocked[1]}, which can run any code'
    if refused:
        return (
            f'{name} refused: it contains {refused[1]}, and only tensors, plain containers, '
            'numbers, NumPy arrays, argparse.Namespace and the training history of mmengine are '
            'loaded, since other types can run code. If you trust the file, allow the type with '
            f'torch.serialization.add_safe_globals([{refused[1]}]), or all of them with the '
            'environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1'
        )
    if isinstance(error, RuntimeError) and 'PytorchStreamReader' not in text:
        return None
    # A truncated file makes torch seek to a place that is not there.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return None
    detail = re.search(r'WeightsUnpickler error:\s*(.+)', text)
    reason = detail[1] if detail else (text.strip().splitlines() or [type(error).__name__])[0]
    if reason.startswith('Weights only load failed'):
        # torch's message continues with advice to load the file unsafely.
        reason = 'it does not begin as one'
    return f'{name} cannot be read: it is damaged or not a PyTorch checkpoint ({reason})'


@functools.cache
def _allowed() -> tuple:
    """Entries for ``torch.serialization.safe_globals``."""
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    # NumPy 1.26 has a numpy._core too, which is only a name.
    core = 'numpy._core' if int(np.__version__.partition('.')[0]) >= 2 else 'numpy.core'
    multiarray = importlib.import_module(f'{core}.multiarray')
    # Text, raw bytes and numbers; not objects, whose content could be anything.
    kinds = [np.dtype(code) for code in (*'?bhilqBHILQefdFD', 'S1', 'U1')]
    return (
        argparse.Namespace,
        # Loaded as plain ordered dicts; the classes' own code is not needed.
        *((collections.OrderedDict, name) for name in _SETTINGS),
        HistoryBuffer,
        (_history_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        *{type(kind) for kind in kinds},
        # Files written with NumPy 1 name one module, those with NumPy 2 the other.
        *(
            (getattr(multiarray, name), f'numpy.{package}.multiarray.{name}')
            for package in ('core', '_core')
            for name in ('_reconstruct', 'scalar')
        ),
    )


# Subclasses of dict by which official training scripts keep their settings along with the weights.
_SETTINGS = (
    'yacs.config.CfgNode',  # VMamba
    'easydict.EasyDict',
    'utils.easydict.EasyDict',  # multimodal VideoMamba
)


def _history_method(owner: type, name: str) -> Any:
    """``getattr`` for its only use in checkpoints: methods of a HistoryBuffer."""
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError('GLOBAL builtins.getattr was not an allowed global')
    return getattr(owner, name)


def hash_in_name(name: str) -> str | None:
    """The beginning of the SHA-256 in a name such as ``model-0123abcd.pth``, or None.

    Eight digits that form a date, as in ``model-20240131.pth``, are not a hash.
    """
    found = re.search(r'-([0-9a-f]{8,64})\.(?:pth|pt|safetensors|pth\.tar)$', name)
    if not found or re.fullmatch(r'(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])', found[1]):
        return None
    return found[1]


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    import hashlib

    with open(file, 'rb') as opened:
        if hasattr(hashlib, 'file_digest'):
            return hashlib.file_digest(opened, 'sha256').hexdigest()
        return hashlib.sha256(opened.read()).hexdigest()  # Python 3.10


def _download(load_url: Callable[..., Any], url: str, *args: Any, **kwargs: Any) -> Any:
    """``torch.hub.load_state_dict_from_url`` without endless waits and invalid cached files."""
    import socket

    from torch import hub

    folder = kwargs.get('model_dir') or os.path.join(hub.get_dir(), 'checkpoints')
    cached = Path(folder, kwargs.get('file_name') or os.path.basename(url.partition('?')[0]))
    was_there = cached.exists()
    # torch.hub passes weights_only=False by default; None restores torch.load's default.
    kwargs.setdefault('weights_only', None)
    # torch.hub verifies the hash of downloads, but not of cached files.
    expected = hash_in_name(cached.name)
    kwargs.setdefault('check_hash', expected is not None)
    if was_there and expected is not None and not sha256(cached).startswith(expected):
        cached.unlink()
        was_there = False
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT if before is None else before)
    try:
        if cached.suffix == '.safetensors':
            if not was_there:
                cached.parent.mkdir(parents=True, exist_ok=True)
                hub.download_url_to_file(url, str(cached), expected, progress=False)
            return {'state_dict': load_safetensors(str(cached), kwargs.get('map_location'))}
        return load_url(url, *args, **kwargs)
    except Exception:
        if not was_there:
            cached.unlink(missing_ok=True)
        raise
    finally:
        socket.setdefaulttimeout(before)


def _patch(checkpoint: ModuleType) -> None:
    @replaces(checkpoint.CheckpointLoader, 'load_checkpoint')
    def load_checkpoint(
        original: Callable,
        cls: type,
        filename: str,
        map_location: Any = None,
        logger: Any = 'current',
    ) -> Any:
        if str(filename).endswith('.safetensors') and '://' not in str(filename):
            return {'state_dict': load_safetensors(str(filename), map_location)}
        with allowed_types(filename):
            return original(cls, filename, map_location, logger)

    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = load
    replaces(checkpoint, 'load_url')(_download)
