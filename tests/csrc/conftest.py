"""Fixtures for the tests of the build, the loader and the CPU kernels."""

import shutil
import sys

import pytest
from csrc_support import ROOT, load_module


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def builder():
    """csrc/build.py, fresh."""
    yield load_module('mmvim_build_under_test', ROOT / 'csrc' / 'build.py')
    del sys.modules['mmvim_build_under_test']


@pytest.fixture
def csrc(tmp_path):
    """A copy of csrc that a test may edit."""
    return shutil.copytree(ROOT / 'csrc', tmp_path / 'csrc')


@pytest.fixture
def package(tmp_path):
    """mmvim.ops alone in a package of its own, not compiled, beside the real csrc."""
    folder = tmp_path / 'package'
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'mmvim' / 'ops', folder / 'mmvim' / 'ops', ignore=ignore)
    (folder / 'mmvim' / '__init__.py').touch()
    (folder / 'csrc').symlink_to(ROOT / 'csrc')
    return folder


@pytest.fixture
def extension(package, tmp_path, monkeypatch):
    """A second mmvim.ops.extension, of that package, with a cache of its own."""
    monkeypatch.setenv('MMVIM_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.delenv('MMVIM_JIT', raising=False)
    name = 'mmvim_extension_under_test'
    yield load_module(name, package / 'mmvim' / 'ops' / 'extension.py')
    del sys.modules[name]
    sys.modules.pop('mmvim_csrc_build', None)
