"""Fixtures of the tests of ``mmvim.compat``."""

import pytest

from mmvim import compat


@pytest.fixture(scope='session')
def mmcv_ops():
    """``mmcv.ops`` on mmvim's replacement for the compiled ops."""
    pytest.importorskip('mmcv')
    compat.install()
    if compat.mmcv_ops.is_compiled():
        pytest.skip('this mmcv has compiled ops of its own')
    import mmcv.ops

    return mmcv.ops


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    return request.param
