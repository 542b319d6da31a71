"""Every accuracy test runs on each device and backend that this machine has."""

import pytest

from mmvim.ops import use_backend


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(params=['torch', 'compiled'])
def backend(request):
    """The backend in force; a test says with ``need`` which op it will run."""
    with use_backend(request.param):
        yield request.param
