"""Local file writes that happen completely or leave the old file in place."""

import contextlib
import os
import uuid
from pathlib import Path

from mmengine.fileio import io, register_backend
from mmengine.fileio.backends import LocalBackend

TEMPORARY_SUFFIX = '.mmvim-tmp'


class AtomicLocalBackend(LocalBackend):
    """mmengine's local backend, which writes next to the target and then renames.

    A killed process or a full disk in the middle of a checkpoint leaves at most a ``*.mmvim-tmp``
    file, never a truncated checkpoint under its final name.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` to ``filepath``, creating its directory.

        Raises:
            OSError: The file cannot be written; ``filepath`` is then unchanged.
        """
        directory = os.path.dirname(filepath)
        if directory:
            os.makedirs(directory, exist_ok=True)
        # Several ranks may write the same file, for instance the metrics of a test.
        temporary = f'{filepath}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}'
        try:
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, filepath)
            _sync_directory(directory or '.')
        except BaseException as error:
            if os.path.exists(temporary):
                os.remove(temporary)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(filepath)) from error
            raise

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text to ``filepath`` as :meth:`put` writes bytes."""
        self.put(obj.encode(encoding), filepath)


def _sync_directory(directory: str) -> None:
    """Write a directory's entries to disk, where the file system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def install() -> None:
    """Make every local write of this process through mmengine's file layer atomic."""
    register_backend('local', AtomicLocalBackend, prefixes='', force=True)
    # Existing instances are cached by prefix.
    for key, backend in list(io.backend_instances.items()):
        if type(backend) is LocalBackend:
            del io.backend_instances[key]
