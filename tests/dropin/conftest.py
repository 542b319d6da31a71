"""The names are importable in these tests, at collection already."""

import pytest

from mmvim import dropin

dropin.install()


@pytest.fixture(autouse=True, scope='session')
def _uninstalled_afterwards():
    yield
    dropin.uninstall()
