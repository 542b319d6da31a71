"""Counts of what the reliability tests did, for the summary line of ``tests/conftest.py``."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope='session')
def runs():
    """A process that starts trainings quickly."""
    from runs import Runs

    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture
def count(record_property) -> Callable[..., None]:
    """``count(kind, n=1)``: add to the counts of the summary, such as kills or injected faults.

    A test that counts no ``cases`` is one case.
    """

    def add(kind: str, n: int = 1) -> None:
        record_property('count', (kind, n))

    return add
