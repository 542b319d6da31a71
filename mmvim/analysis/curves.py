"""Training curves, from the scalars that mmengine's ``LocalVisBackend`` writes."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALARS = '[0-9]*/vis_data/scalars.json'
#: Entries that do not measure the training itself.
_BOOKKEEPING = frozenset({'step', 'epoch', 'iter', 'time', 'data_time', 'memory', 'lr', 'base_lr'})

# As in: Epoch(train)  [3][ 40/113]
_EPOCH = r'Epoch\(train\)\s+\[\d+\]\[\s*\d+/(\d+)\]'


@dataclass(frozen=True)
class Run:
    """The scalars of one training run.

    Attributes:
        name: Name of the work directory.
        train: Entries of the training loop, in order; 'step' is the iteration.
        val: Entries of the validations, in order; 'step' is the iteration here, too.
    """

    name: str
    train: tuple[dict[str, Any], ...]
    val: tuple[dict[str, Any], ...]

    def keys(self) -> list[str]:
        """Keys that can be drawn: losses, the learning rate, metrics."""
        names = {key for entry in (*self.train, *self.val) for key, x in entry.items() if _real(x)}
        return sorted(names - _BOOKKEEPING | ({'lr'} & names))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a key.

        Raises:
            KeyError: The run has no such key.
        """
        entries = [e for e in (*self.train, *self.val) if _real(e.get(key))]
        if not entries:
            raise KeyError(f'{self.name} has no {key!r}; it has {", ".join(self.keys())}')
        return [e['step'] for e in entries], [float(e[key]) for e in entries]

    def summary(self) -> dict[str, Any]:
        """Iterations, seconds per iteration, peak memory, last loss, first best of each metric."""
        times = [e['time'] for e in self.train if 'time' in e]
        memory = [e['memory'] for e in self.train if 'memory' in e]
        return {
            'name': self.name,
            'iterations': self.train[-1]['step'],
            'last_loss': self.train[-1].get('loss'),
            'seconds_per_iteration': sum(times) / len(times) if times else None,
            'memory_mib': max(memory) if memory else None,
            'metrics': {key: self._extremes(key) for key in self._metrics()},
        }

    def _metrics(self) -> list[str]:
        return sorted({k for e in self.val for k, x in e.items() if _real(x)} - _BOOKKEEPING)

    def _extremes(self, key: str) -> dict[str, float]:
        entries = [e for e in self.val if _real(e.get(key))]
        values = [e[key] for e in entries]
        best = max(range(len(values)), key=lambda i: values[i])
        return {'highest': values[best], 'at_iteration': entries[best]['step'], 'last': values[-1]}


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: str | Path) -> Run:
    """Read the training of a work directory, with all its resumptions.

    Args:
        path: A work directory of ``tools/train.py``, or a ``scalars.json``.

    Raises:
        FileNotFoundError: There is no ``scalars.json``.
        ValueError: There is no training entry, or a line that is not JSON.
    """
    path = Path(path)
    if path.suffix == '.json':
        files = [path]
        name = path.resolve().parents[2].name if len(path.resolve().parents) > 2 else path.stem
    else:
        files, name = sorted(path.glob(SCALARS)), path.resolve().name
        if not files:
            raise FileNotFoundError(
                f'no {SCALARS} in {str(path)!r}: it is no work directory of a training run with '
                'LocalVisBackend'
            )
    train: list[dict] = []
    val: list[dict] = []
    for file in files:
        new_train, new_val = _read_scalars(file)
        if not new_train:  # of a test
            continue
        # What was logged after the checkpoint that this part starts from was done again.
        start = new_train[0]['step']
        train = [entry for entry in train if entry['step'] < start] + new_train
        again = {entry['step'] for entry in new_val}
        val = [e for e in val if e['step'] < start and e['step'] not in again] + new_val
    if not train:
        raise ValueError(f'{str(path)!r} has no entry of a training loop')
    return Run(name, tuple(train), tuple(val))


def _read_scalars(file: Path) -> tuple[list[dict], list[dict]]:
    """Entries of the training and of the validations, 'step' in iterations."""
    train, val, before = [], [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'line {number} of {str(file)!r} is no JSON: {error}') from error
        if 'loss' in entry:
            train.append(entry)
        elif 'step' in entry:
            before.append(train[-1]['step'] if train else 0)
            # A loop of iterations with log_processor.by_epoch=True is always in epoch 0.
            val.append({**entry, 'step': entry['step'] or before[-1]})
    # A validation counts in epochs or iterations, as the training loop does. In iterations, none is
    # before the training that was logged before it.
    # In epochs, one that a resumed run makes up for has no higher number than the next epoch.
    epoch = train[0].get('epoch', 0) if train else 0
    if any(
        entry['step'] < step or (step == 0 and 0 < entry['step'] <= epoch)
        for entry, step in zip(val, before, strict=True)
    ):
        length = _epoch_length(file, train)
        val = [{**entry, 'step': round(entry['step'] * length)} for entry in val]
    return train, val


def _epoch_length(file: Path, train: list[dict]) -> float:
    """Iterations of an epoch: from the text log, which has it, else as the entries allow."""
    for log in sorted(file.parents[1].glob('*.log')):
        found = re.search(_EPOCH, log.read_text(errors='replace'))
        if found:
            return int(found[1])
    return max(entry['step'] / entry.get('epoch', 1) for entry in train)


def draw_runs(
    runs: Sequence[Run], out: str | Path, keys: Sequence[str] | None = None, smooth: int = 1
) -> Path:
    """Draw curves of one or more runs, with one panel per key shared by all runs.

    Args:
        runs: Runs to compare.
        out: Picture to write (png, pdf, svg).
        keys: Keys to draw. Defaults to None: the loss and the metrics of all validations.
        smooth: Width, in entries, of the running mean of training values. Defaults to 1.

    Raises:
        KeyError: A run does not have a key.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np

    if keys is None:
        keys = ['loss', *sorted({key for run in runs for key in run._metrics()})]
    columns = min(len(keys), 3)
    rows = math.ceil(len(keys) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.6 * rows), layout='constrained', squeeze=False
    )
    for panel in axes.flat[len(keys) :]:
        panel.axis('off')
    for panel, key in zip(axes.flat, keys, strict=False):
        for run in runs:
            steps, values = run.series(key)
            is_val = not any(key in entry for entry in run.train)
            if not is_val and smooth > 1:
                width = min(smooth, len(values))
                values = np.convolve(values, np.ones(width) / width, mode='valid')
                steps = steps[width - 1 :]
            panel.plot(steps, values, marker='o' if is_val else None, ms=3, label=run.name)
        panel.set(xlabel='iteration', title=key)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    if len(runs) > 1:
        axes.flat[0].legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return Path(out)
