#!/usr/bin/env python
"""Draw the scan against mamba_ssm, for docs/operations, from the rows of tools/benchmark/ops.py

The picture is plain text that depends only on the rows, so that --check can tell if it is current.
"""

import argparse
import csv
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / 'docs' / 'operations' / 'benchmarks'
FIGURES, PICTURE = FOLDER / 'h100.csv', FOLDER / 'claim.svg'
PEER = 'mamba_ssm'
COLOURS = {'forward': '#2563a8', 'backward': '#e08214'}

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 760, 178, 44, 64, 10, 7


def factors(path: Path) -> tuple[dict[str, dict[str, float]], str]:
    """Speed of the scan relative to the peer, by shape and direction; and the device."""
    times: dict[tuple[str, str, str], float] = {}
    device = ''
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            if row['op'] == 'scan' and row['direction'] in COLOURS:
                times[row['shape'], row['direction'], row['implementation']] = float(row['time'])
                device = row['device']
    found: dict[str, dict[str, float]] = {}
    for (shape, direction, implementation), time in times.items():
        if implementation == PEER:
            found.setdefault(shape, {})[direction] = time / times[shape, direction, 'mmvim']
    if not found:
        raise ValueError(f'{path} has no scan of {PEER}')
    return found, device


def draw(path: Path = FIGURES) -> str:
    """The picture as SVG."""
    by_shape, device = factors(path)
    step = 2 * BAR + GAP
    bottom = TOP + len(by_shape) * step
    highest = max(x for by_direction in by_shape.values() for x in by_direction.values())
    unit = (WIDTH - LEFT - RIGHT) / highest
    height = bottom + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">Selective scan: how many times as '
        f'fast as {PEER}</text>',
        f'<text x="12" y="42" fill="#555555">{device}, bfloat16, gate and softplus on; the line is '
        f'{PEER}’s speed</text>',
    ]
    for i, (direction, colour) in enumerate(COLOURS.items()):
        x = WIDTH - 190 + 95 * i
        parts.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="22">{direction}</text>')
    for i in range(int(highest) + 1):
        x = LEFT + i * unit
        colour, width = ('#000000', 1.5) if i == 1 else ('#dddddd', 1)
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="{colour}" '
            f'stroke-width="{width}"/>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555555">{i}</text>'
        )
    for i, (shape, by_direction) in enumerate(by_shape.items()):
        top = TOP + i * step
        parts.append(f'<text x="{LEFT - 8}" y="{top + BAR + 4}" text-anchor="end">{shape}</text>')
        for j, (direction, factor) in enumerate(sorted(by_direction.items(), reverse=True)):
            y = top + j * BAR
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{factor * unit:.1f}" height="{BAR - 1}" '
                f'fill="{COLOURS[direction]}"/>'
            )
            parts.append(
                f'<text x="{LEFT + factor * unit + 4:.1f}" y="{y + BAR - 1}" '
                f'font-size="10">{factor:.1f}</text>'
            )
    return '\n'.join([*parts, '</svg>', ''])


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='only fail if the picture is old')
    args = parser.parse_args()
    picture = draw()
    if PICTURE.is_file() and PICTURE.read_text() == picture:
        return 0
    if args.check:
        print(f'{PICTURE.name} is not of {FIGURES.name}: python tools/misc/claim_picture.py')
        return 1
    PICTURE.write_text(picture)
    print(f'updated: {PICTURE}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
