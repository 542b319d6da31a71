"""Shared pytest configuration: GPU tests are skipped where there is no CUDA device."""

import gc
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import mmvim  # noqa: F401  # its shims come before the packages that they are for

# Outputs of the official code that are too large for the repository.
GOLDEN = Path(__file__).resolve().parents[2] / 'shared' / 'golden'
if GOLDEN.is_dir():
    os.environ.setdefault('MMVIM_GOLDEN', str(GOLDEN))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason='needs a CUDA device')
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope='module')
def no_collection_of_modules():
    """Spare the garbage collector what is imported: mmengine calls it for each data set."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Let what a test draws depend neither on the tests before it nor on the worker it runs in."""
    random.seed(0)
    torch.manual_seed(0)
    if 'numpy' in sys.modules:
        sys.modules['numpy'].random.seed(0)


@pytest.fixture(autouse=True)
def no_default_scope():
    """Let no test inherit the default scope that a Runner of an earlier one has set."""
    yield
    registry = sys.modules.get('mmengine.registry')
    if registry is not None:
        registry.DefaultScope._instance_dict.clear()


def pytest_terminal_summary(terminalreporter):
    """Say how many cases, kills and injected faults the reliability tests have come through."""
    counts, failed = Counter(), 0
    for outcome in ('passed', 'failed'):
        for report in terminalreporter.stats.get(outcome, ()):
            if '/reliability/' not in report.nodeid or report.when != 'call':
                continue
            own = [value for name, value in report.user_properties if name == 'count']
            counts['cases'] += not any(kind == 'cases' for kind, _ in own)
            for kind, n in own:
                counts[kind] += n
            failed += outcome == 'failed'
    if counts:
        cases = counts.pop('cases', 0)
        rest = ''.join(f', {n:,} {kind}' for kind, n in sorted(counts.items()))
        terminalreporter.write_line(f'reliability: {cases:,} cases{rest}; {failed} tests failed')
