#!/usr/bin/env python
"""Update the model tables of README files and docs from the metafiles."""

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.apis.model_zoo import ModelInfo, models

ROOT = Path(__file__).resolve().parents[2]
BEGIN = re.compile(r'<!-- model zoo: (?P<data>[^>]+?)(?: of (?P<family>[\w]+))? -->\n')
END = '<!-- end of model zoo -->'
OVERVIEW = 'overview'


def training_data(info: ModelInfo) -> str:
    """The data sets that a model saw, which name its table."""
    data = info.entry.get('Metadata', {}).get('Training Data', '')
    return ', '.join(data) if isinstance(data, list) else data


def table(infos: Iterable[ModelInfo], folder: Path) -> str:
    """One table of models, with links that work from ``folder``."""
    infos = list(infos)
    metrics = list(
        dict.fromkeys(m for info in infos for result in info.results for m in result['Metrics'])
    )
    has_macs = any(info.macs for info in infos)
    has_weights = any(info.weights for info in infos)
    header = ['Model', 'Params', *(['MACs'] if has_macs else []), *metrics]
    header += [*(['Weights'] if has_weights else []), 'Config']
    lines = [header, ['---'] * len(header)]
    for info in infos:
        values = {m: x for result in info.results for m, x in result['Metrics'].items()}
        row = [f'`{info.name}`', f'{info.parameters / 1e6:.2f} M']
        if has_macs:
            row.append(f'{info.macs / 1e9:.2f} G' if info.macs else '–')
        row += [str(values.get(metric, '–')) for metric in metrics]
        if has_weights:
            row.append(f"[authors']({info.weights})" if info.weights else '–')
        link = Path(os.path.relpath(info.config, folder)).as_posix()
        row.append(f'[{info.config.stem}]({link})')
        lines.append(row)
    return ''.join(f'| {" | ".join(row)} |\n' for row in lines)


def overview(folder: Path) -> str:
    """One row for each family and data set, with links that work from ``folder``."""
    groups: dict[tuple[str, str], list[ModelInfo]] = {}
    for info in models().values():
        groups.setdefault((info.collection, training_data(info)), []).append(info)
    header = ['Family', 'Data', 'Models', 'Params', "Authors' weights", 'Reported by the authors']
    lines = [header, ['---'] * len(header)]
    for (family, data), infos in groups.items():
        weights = sum(info.weights is not None for info in infos)
        link = Path(os.path.relpath(infos[0].config.parent / 'README.md', folder)).as_posix()
        sizes = _span([info.parameters / 1e6 for info in infos], '.1f')
        metrics: dict[str, list[float]] = {}
        for info in infos:
            for result in info.results:
                for metric, value in result['Metrics'].items():
                    metrics.setdefault(metric, []).append(value)
        reported = '; '.join(f'{m} {_span(values, ".1f")}' for m, values in metrics.items())
        row = [f'[{family}]({link})', data, str(len(infos)), f'{sizes} M']
        lines.append([*row, str(weights or '–'), reported or '–'])
    return ''.join(f'| {" | ".join(row)} |\n' for row in lines)


def _span(values: list[float], style: str) -> str:
    low, high = f'{min(values):{style}}', f'{max(values):{style}}'
    return low if low == high else f'{low} to {high}'


def fill(text: str, folder: Path) -> str:
    """Update the tables in a Markdown text.

    A table lies between ``<!-- model zoo: DATA -->`` (or ``<!-- model zoo: DATA of FAMILY -->``)
    and ``<!-- end of model zoo -->``. Without a family it has the models whose configs are in
    ``folder``. ``<!-- model zoo: overview -->`` has a row for each family and data set.

    Raises:
        ValueError: A marker has no end, or no model belongs to it.
    """
    parts, position = [], 0
    for mark in BEGIN.finditer(text):
        end = text.find(END, mark.end())
        if end < 0:
            raise ValueError(f'{mark[0].strip()} has no {END}')
        if mark['data'] == OVERVIEW:
            parts += [text[position : mark.end()], '\n', overview(folder), '\n']
            position = end
            continue
        chosen = [
            info
            for info in models().values()
            if training_data(info) == mark['data']
            and (
                info.collection == mark['family']
                if mark['family']
                else info.config.parent == folder.resolve()
            )
        ]
        if not chosen:
            raise ValueError(f'no model belongs to {mark[0].strip()}')
        parts += [text[position : mark.end()], '\n', table(chosen, folder), '\n']
        position = end
    return ''.join((*parts, text[position:]))


def files(root: Path) -> list[Path]:
    """The Markdown files that have such tables."""
    found = [root / 'README.md', *root.glob('configs/*/README.md'), *root.glob('docs/**/*.md')]
    return sorted(path for path in found if BEGIN.search(path.read_text()))


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='only fail if a table is old')
    args = parser.parse_args()
    old = []
    for path in files(ROOT):
        text = path.read_text()
        new = fill(text, path.parent)
        if new == text:
            continue
        old.append(path.relative_to(ROOT))
        if not args.check:
            path.write_text(new)
    for path in old:
        print(f'{"out of date" if args.check else "updated"}: {path}')
    return 1 if old and args.check else 0


if __name__ == '__main__':
    sys.exit(main())
