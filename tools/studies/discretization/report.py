#!/usr/bin/env python3
"""Tables and pictures of the study of discretizations.

    python tools/studies/discretization/report.py results             # tables, in Markdown
    python tools/studies/discretization/report.py results --pictures docs/records/pictures

Reads the tables that run.py and integration_error.py have written, those that are there. Intervals
are 95 % confidence intervals of Student's t over seeds. A method is compared with zoh seed by seed
(the same initial weights, images and order): a paired t-test, its p values adjusted by Holm for all
comparisons of a table. A difference counts as real if it is at least half a point and its adjusted
p is below 0.05, as the page said before the first run.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

POINTS, ALPHA = 0.5, 0.05
METHODS = (
    *('zoh', 'zoh_exact', 'foh', 'bilinear', 'poly', 'highorder', 'rk4', 'foh_hold', 'tustin'),
)
Rows = list[dict[str, str]]


class Paired(NamedTuple):
    """A method beside zoh, in points: mean difference, half width, p, Holm's p, seeds."""

    difference: float
    half_width: float
    p: float
    adjusted: float
    seeds: int

    @property
    def real(self) -> bool:
        """Whether the difference counts, by the rule that was stated beforehand."""
        return abs(self.difference) >= POINTS and self.adjusted < ALPHA


def main(argv: list[str] | None = None) -> int:
    """Print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('results', type=Path, help='folder of the tables')
    parser.add_argument('--pictures', type=Path, help='folder for SVG files')
    args = parser.parse_args(argv)
    runs, swaps, steps, integration = (
        read(args.results / f'{name}.csv') for name in ('runs', 'swaps', 'steps', 'integration')
    )
    for title, table in (
        ('Accuracy', accuracy_table(runs)),
        ('Learning rate', rate_table(runs)),
        ('Length', length_table(runs)),
        ('Swap', swap_table(swaps)),
        ('Fine-tuning', fine_tuning_table(runs, swaps)),
        ('Faults', fault_table(runs)),
        ('Step sizes', step_table(steps)),
        ('Integration error', integration_table(integration)),
    ):
        if table:
            print(f'### {title}\n\n{table}\n')
    if args.pictures is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
        draw(args.pictures, runs, swaps, steps, integration)
    return 0


def read(path: Path) -> Rows:
    """A table; no rows if the file is not there."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def accuracies(runs: Rows, part: str, **wanted: str) -> dict[str, dict[int, float]]:
    """Final accuracy of the finished runs of a part, by method and seed."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in runs:
        right = all(row[key] == value for key, value in wanted.items())
        if row['part'] == part and right and row['status'] == 'finished':
            found[row['method']][int(row['seed'])] = float(row['top1'])
    return {m: found[m] for m in METHODS if m in found}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half width; not numbers without values, nor the width of a single one."""
    values = np.asarray(list(values), float)
    if len(values) < 2:
        return float(values.sum()) if len(values) else math.nan, math.nan
    scale = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1) * scale)


def paired(found: dict[str, dict[int, float]], base: str = 'zoh') -> dict[str, Paired]:
    """Each method beside the base over the seeds that both have."""
    differences = {}
    for method, by_seed in found.items():
        seeds = sorted(by_seed.keys() & found.get(base, {}).keys())
        if method != base and len(seeds) > 1:
            differences[method] = np.array([by_seed[s] - found[base][s] for s in seeds])
    p = {m: float(stats.ttest_1samp(d, 0).pvalue) for m, d in differences.items()}
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    return {m: Paired(*interval(d), p[m], adjusted[m], len(d)) for m, d in differences.items()}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted.tolist()


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or nothing without rows."""
    rows = [list(row) for row in rows]
    if not rows:
        return ''
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number, or a dash for one that is not."""
    return '–' if math.isnan(value) else f'{value:{"+" if sign else ""}.{digits}f}'


def with_width(values: Iterable[float], sign: bool = False) -> str:
    """Mean ± half width."""
    mean, width = interval(values)
    shown = number(mean, sign=sign)
    return shown if math.isnan(width) else f'{shown} ± {number(width)}'


def accuracy_table(runs: Rows, part: str = 'main') -> str:
    """Accuracy of each method, its difference from zoh, and runs whose loss was not finite."""
    found = accuracies(runs, part)
    beside = paired(found)
    lost = Counter(row['method'] for row in runs if (row['part'], row['status']) == (part, 'nan'))

    def row(method: str) -> list[str]:
        values = found.get(method, {})
        cells = [f'`{method}`', str(len(values)), str(lost[method])]
        cells.append(with_width(values.values()) if values else '–')
        if method not in beside:
            return [*cells, '–', '–', '–']
        b = beside[method]
        difference = f'{number(b.difference, sign=True)} ± {number(b.half_width)}'
        return [*cells, difference, f'{b.adjusted:.3g}', 'yes' if b.real else 'no']

    head = (
        *('method', 'seeds', 'not finite', 'top-1, %'),
        *('beside zoh, points', "Holm's p", 'real'),
    )
    return markdown(head, (row(m) for m in METHODS if m in found or lost[m]))


def rate_table(runs: Rows) -> str:
    """Accuracy at half, once and twice the learning rate, over the seeds that all three have."""
    by_rate = {r: accuracies(runs, 'rate', rate=r) for r in ('0.5', '2.0')}
    by_rate['1.0'] = accuracies(runs, 'main')
    rows = []
    for method in METHODS:
        per = {r: by_rate[r].get(method, {}) for r in ('0.5', '1.0', '2.0')}
        seeds = sorted(set.intersection(*(set(x) for x in per.values())))
        if seeds:
            means = [float(np.mean([x[s] for s in seeds])) for x in per.values()]
            rows.append([f'`{method}`', str(len(seeds)), *map(number, means)])
    return markdown(('method', 'seeds', '0.5x', '1x', '2x'), rows)


def length_table(runs: Rows) -> str:
    """The accuracy table of 256 tokens."""
    return accuracy_table(runs, 'length')


def swapped(swaps: Rows) -> dict[tuple[str, str], dict[int, float]]:
    """Accuracy by seed of the models trained with one method and run with another."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in swaps:
        found[row['trained'], row['method']][int(row['seed'])] = float(row['top1'])
    return found


def swap_table(swaps: Rows) -> str:
    """Mean accuracy of models trained with a row's method and run with a column's."""
    found = swapped(swaps)
    rows = []
    for trained in METHODS:
        if (trained, trained) in found:
            means = (interval(found[trained, m].values())[0] for m in METHODS)
            seeds = str(len(found[trained, trained]))
            rows.append([f'`{trained}`', seeds, *(number(mean, 1) for mean in means)])
    return markdown(('trained with', 'seeds', *(f'`{m}`' for m in METHODS)), rows)


def fine_tuning_table(runs: Rows, swaps: Rows) -> str:
    """Accuracy as trained, after the change of the method, and after one more epoch with it."""
    before = swapped(swaps)
    rows = []
    for origin, methods in (('zoh', METHODS), *((m, ('zoh',)) for m in METHODS[1:])):
        found = accuracies(runs, 'fine-tune', origin=origin)
        for method in (m for m in methods if m in found):
            seeds = sorted(found[method].keys() & before[origin, method].keys())
            if seeds:
                stages = (before[origin, origin], before[origin, method], found[method])
                cells = (with_width(stage[seed] for seed in seeds) for stage in stages)
                rows.append([f'`{origin}`', f'`{method}`', str(len(seeds)), *cells])
    head = ('trained with', 'changed to', 'seeds', 'as trained, %', 'changed, %', 'one epoch on, %')
    return markdown(head, rows)


def fault_table(runs: Rows) -> str:
    """Accuracy with the faults of earlier code, beside the right code's of the same seeds."""
    right = accuracies(runs, 'main')
    rows = []
    for fault in ('zoh-gradients', 'scaled-twice'):
        lost = Counter(r['method'] for r in runs if (r['fault'], r['status']) == (fault, 'nan'))
        found = accuracies(runs, 'faults', fault=fault)
        for method in (m for m in METHODS if m in found or lost[m]):
            faulty, ours = found.get(method, {}), right.get(method, {})
            seeds = sorted(faulty.keys() & ours.keys())
            cells = ['–'] * 3
            if seeds:
                cells = [with_width(faulty[s] for s in seeds), with_width(ours[s] for s in seeds)]
                cells.append(with_width((faulty[s] - ours[s] for s in seeds), sign=True))
            rows.append([f'`{method}`', fault, str(len(seeds)), str(lost[method]), *cells])
    head = (
        *('method', 'fault', 'seeds', 'not finite'),
        *('with it, %', 'without, %', 'difference, points'),
    )
    return markdown(head, rows)


def step_table(steps: Rows) -> str:
    """Median over layers, directions and seeds of the quantiles of -ΔA."""
    names = [name for name in (steps[0] if steps else ()) if name.startswith('decay_')]
    rows = []
    for method in METHODS:
        own = [row for row in steps if row['trained'] == method]
        if own:
            values = [np.median([float(row[name]) for row in own]) for name in names]
            rows.append([f'`{method}`', *(f'{v:.3g}' for v in values)])
    return markdown(('trained with', *(f'{name[6:]} %' for name in names)), rows)


def integration_table(integration: Rows) -> str:
    """Relative error at 64 steps and the order between 256 and 512, by method and A."""
    error = {(r['method'], r['A'], int(r['steps'])): float(r['error']) for r in integration}
    poles = sorted({r['A'] for r in integration}, key=float, reverse=True)
    head = ('method', *(f'A = {float(a):g}' for a in poles), 'order')
    rows = []
    for method in METHODS:
        if (method, poles[0] if poles else '', 64) in error:
            order = np.mean(
                [math.log2(error[method, a, 256] / error[method, a, 512]) for a in poles]
            )
            cells = (f'{error[method, a, 64]:.1e}' for a in poles)
            # No negative zero.
            rows.append([f'`{method}`', *cells, f'{abs(round(float(order), 1)):.1f}'])
    return markdown(head, rows)


def draw(folder: Path, runs: Rows, swaps: Rows, steps: Rows, integration: Rows) -> None:
    """One SVG a table that has rows."""
    import matplotlib

    matplotlib.use('svg')
    from matplotlib import pyplot as plt

    plt.rcParams['svg.hashsalt'] = 'mmvim'

    def save(name: str, rows: Rows, paint: Callable) -> None:
        if not rows:
            return
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout='constrained')
        paint(axes)
        figure.savefig(folder / f'discretization_{name}.svg', metadata={'Date': None})
        plt.close(figure)

    def differences(axes) -> None:
        beside = paired(accuracies(runs, 'main'))
        for i, b in enumerate(beside.values()):
            axes.errorbar(i, b.difference, b.half_width, fmt='o', capsize=4, color='C0')
        axes.axhspan(-POINTS, POINTS, color='0.9')
        axes.axhline(0, color='0.5', linewidth=0.8)
        axes.set_xticks(range(len(beside)), beside, rotation=30)
        axes.set_ylabel('top-1 beside zoh, points')

    def curves(axes) -> None:
        for method in METHODS:
            own = [
                [float(x) for x in row['top1_by_epoch'].split()]
                for row in runs
                if row['part'] == 'main' and row['method'] == method and row['status'] == 'finished'
            ]
            if own:
                axes.plot(range(1, len(own[0]) + 1), np.mean(own, axis=0), label=method)
        axes.set(xlabel='epoch', ylabel='top-1, %')
        axes.legend(fontsize='small', ncols=2)

    def decays(axes) -> None:
        names = [name for name in steps[0] if name.startswith('decay_')]
        levels = [float(name[6:]) for name in names]
        for method in METHODS:
            own = [[float(row[n]) for n in names] for row in steps if row['trained'] == method]
            if own:
                axes.plot(np.median(own, axis=0), levels, marker='.', label=method)
        axes.set(xscale='log', xlabel='−ΔA', ylabel='share of the values below, %')
        axes.legend(fontsize='small')

    def errors(axes) -> None:
        for method in METHODS:
            own = [r for r in integration if r['method'] == method and float(r['A']) == -4]
            axes.plot(
                [1 / int(r['steps']) for r in own], [float(r['error']) for r in own],
                marker='.', label=method,
            )  # fmt: skip
        axes.set(xscale='log', yscale='log', xlabel='Δ', ylabel='relative error, A = −4')
        axes.legend(fontsize='small', ncols=2)

    save('differences', [r for r in runs if r['part'] == 'main'], differences)
    save('curves', [r for r in runs if r['part'] == 'main'], curves)
    save('steps', steps, decays)
    save('integration', integration, errors)


if __name__ == '__main__':
    sys.exit(main())
