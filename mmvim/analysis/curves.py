"""Training curves, from the scalars that mmengine's ``LocalVisBackend`` writes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALARS = '[0-9]*/vis_data/scalars.json'
#: Entries that do not measure the training itself.
_BOOKKEEPING = frozenset({'step', 'epoch', 'iter', 'time', 'data_time', 'memory', 'lr', 'base_lr'})


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
    """Read the newest training run of a work directory.

    Args:
        path: A work directory of ``tools/train.py``, or a ``scalars.json``.

    Raises:
        FileNotFoundError: There is no ``scalars.json``.
        ValueError: The file has no training entry, or a line that is not JSON.
    """
    path = Path(path)
    file = path
    if path.suffix != '.json':
        found = sorted(path.glob(SCALARS))
        if not found:
            raise FileNotFoundError(
                f'no {SCALARS} in {str(path)!r}: it is no work directory of a training run with '
                'LocalVisBackend'
            )
        # Tests write scalars of their own in addition to those of the training.
        file = next((f for f in reversed(found) if '"loss"' in f.read_text()), found[-1])
        name = path.resolve().name
    else:
        name = file.resolve().parents[2].name if len(file.resolve().parents) > 2 else file.stem
    train, val = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'line {number} of {str(file)!r} is no JSON: {error}') from error
        (train if 'loss' in entry else val).append(entry)
    if not train:
        raise ValueError(f'{str(file)!r} has no entry of a training loop')
    # Validation entries count in epochs or iterations, like the training loop.
    last = train[-1]
    if val and 'epoch' in last and val[-1].get('step', 0) <= last['epoch'] < last['step']:
        per_epoch = last['step'] / last['epoch']
        val = [{**entry, 'step': round(entry['step'] * per_epoch)} for entry in val]
    return Run(name, tuple(train), tuple(entry for entry in val if 'step' in entry))


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
