"""A table on disk that grows while a benchmark runs."""

import contextlib
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def open_rows(
    path: Path | None, names: Sequence[str], head: str = ''
) -> Iterator[Callable[[dict], None]]:
    """Give the function that writes a row.

    A row is in the file when the function returns: a run that is stopped, by whatever signal,
    leaves what it has measured.

    Args:
        path: The file, which is replaced. None: rows are dropped.
        names: The columns.
        head: A line above them, such as the machine.
    """
    if path is None:
        yield lambda row: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        if head:
            file.write(f'{head}\n')
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        file.flush()

        def write(row: dict) -> None:
            writer.writerow(row)
            file.flush()

        yield write
