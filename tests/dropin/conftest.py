"""The names are importable in these tests, at collection already."""

import sys

import pytest

from mmvim import dropin

dropin.install()
_provided: dict[str, object] = {}


def pytest_collection_finish():
    """Keep the modules that the tests have imported from."""
    folder = f'{dropin.__path__[0]}/packages/'
    for name, module in list(sys.modules.items()):
        if (getattr(module, '__file__', None) or '').startswith(folder):
            _provided[name] = module


@pytest.fixture(autouse=True)
def _installed():
    """Install again: the guide's code blocks, tested in the same process, uninstall."""
    dropin.install()
    sys.modules.update(_provided)


@pytest.fixture(autouse=True, scope='session')
def _uninstalled_afterwards():
    yield
    dropin.uninstall()
