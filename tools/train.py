#!/usr/bin/env python3
"""Train the model of a config: ``python tools/train.py CONFIG``; ``--help`` lists the flags."""

import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from mmvim.cli.launcher import main_train
except ImportError as error:
    if (error.name or '').startswith('mmvim'):
        raise
    sys.exit(f'error: {error}')

if __name__ == '__main__':
    main_train()
