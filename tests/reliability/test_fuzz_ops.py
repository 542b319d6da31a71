"""Every public op, with sizes, layouts, dtypes and arguments that hypothesis thinks of."""

import os

import fuzz_ops
import pytest
from fuzz_sandbox import Sandbox, fuzz

OPS = tuple(fuzz_ops.TENSORS)


@pytest.fixture(scope='module')
def sandbox():
    box = Sandbox('fuzz_ops')
    yield box
    box.close()


@pytest.mark.parametrize('op', OPS)
def test_sample(op, sandbox, count):
    fuzz(fuzz_ops.cases(op), sandbox, count, 20, always_the_same=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('op', OPS)
def test_many(op, sandbox, count):
    """Other cases in every run; MMVIM_FUZZ_CASES sets their number per op."""
    fuzz(fuzz_ops.cases(op), sandbox, count, int(os.environ.get('MMVIM_FUZZ_CASES', '1300')))
