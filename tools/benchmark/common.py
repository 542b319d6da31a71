"""Arguments and tables of the benchmarks."""

import argparse
import contextlib
import csv
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import mmvim
from mmvim.ops import backend_info


def positive(text: str) -> int:
    """A positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be positive, got {value}')
    return value


def describe(device: torch.device) -> str:
    """The machine and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor()
    info = backend_info()
    kernels = info.get(f'{device.type}_kernels', []) if info['loaded'] else []
    return (
        f'# {name or platform.machine()}, torch {torch.__version__}, mmvim {mmvim.__version__}, '
        f'compiled ops: {", ".join(kernels) or "none"}'
    )


@contextlib.contextmanager
def open_rows(
    path: Path | None, names: Sequence[str], head: str = ''
) -> Iterator[Callable[[dict], None]]:
    """Give the function that writes a row into a table on disk.

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
