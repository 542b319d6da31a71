"""Every public op, with sizes, layouts, dtypes and arguments that hypothesis thinks of."""

import os
from collections import Counter

import fuzz_ops
import pytest
from fuzz_sandbox import Sandbox
from hypothesis import HealthCheck, given, settings

OPS = tuple(fuzz_ops.TENSORS)


@pytest.fixture(scope='module')
def sandbox():
    box = Sandbox('fuzz_ops')
    yield box
    box.close()


def fuzz(op, sandbox, count, cases, derandomize):
    kinds = Counter()

    @settings(
        max_examples=cases,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzz_ops.cases(op))
    def run(case):
        outcome = sandbox.run(case)
        kinds[outcome.kind] += 1
        assert outcome.good, f'{outcome.kind}: {outcome.detail}'

    try:
        run()
    finally:
        count('cases', kinds.total())
        for kind, n in kinds.items():
            count(kind, n)
    assert kinds['ok'] > cases // 10, kinds
    assert kinds['refused'] > cases // 10, kinds


@pytest.mark.parametrize('op', OPS)
def test_sample(op, sandbox, count):
    fuzz(op, sandbox, count, 20, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('op', OPS)
def test_many(op, sandbox, count):
    """Other cases in every run; MMVIM_FUZZ_CASES sets their number per op."""
    fuzz(op, sandbox, count, int(os.environ.get('MMVIM_FUZZ_CASES', '1300')), derandomize=False)
