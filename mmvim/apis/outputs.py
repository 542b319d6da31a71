"""Output files that appear completely or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path


class OutputFolder:
    """Files that appear in a folder together, once all of them are complete.

    They are first written elsewhere in the folder. After an error nothing of them remains, and
    existing files are unchanged.

    Args:
        folder: The folder; created if missing.
        names: Paths, relative to it, of the files that will be written.
        overwrite: Whether these may already exist. Defaults to False.

    Raises:
        FileExistsError: One of the files exists, or ``folder`` is a file.

    Example:
        >>> with OutputFolder('out', ['a.txt']) as out:
        ...     out.path('a.txt').write_text('complete')
    """

    def __init__(
        self, folder: str | Path, names: Iterable[str | Path], overwrite: bool = False
    ) -> None:
        self.folder = Path(folder)
        self._temporary = self.folder / f'.mmvim-{uuid.uuid4().hex[:8]}'
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f'{str(self.folder)!r} exists and is no folder')
        existing = [name for name in names if (self.folder / name).exists()]
        if existing and not overwrite:
            more = f' (and {len(existing) - 1} more)' if len(existing) > 1 else ''
            raise FileExistsError(f'{str(self.folder / existing[0])!r} exists{more}')

    def path(self, name: str | Path) -> Path:
        """Temporary path for writing a file; its folder exists."""
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def final(self, name: str | Path) -> Path:
        """Final path of the file."""
        return self.folder / name

    def __enter__(self) -> 'OutputFolder':
        # Folders created for the files are removed with them.
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if kind is not None:
                for folder in self._made:
                    folder.rmdir()

    def _publish(self) -> None:
        for source in sorted(p for p in self._temporary.rglob('*') if p.is_file()):
            target = self.folder / source.relative_to(self._temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
