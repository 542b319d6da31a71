#!/usr/bin/env python
"""Update the model tables of README files and docs from the metafiles."""

import argparse
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmvim.apis.tables import files, fill

ROOT = Path(__file__).resolve().parents[2]


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
