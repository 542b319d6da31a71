"""Package look-ups of mmengine with the OneDL distributions and without ``pkg_resources``."""

import importlib.util
import types
from importlib import metadata

import pytest

from mmvim.compat import mmengine_packages as shim


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on ``sys.path``; ``add(distribution, module)`` installs into it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(distribution, module=None):
        name = distribution.replace('-', '_')
        info = tmp_path / f'{name}-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Name: {distribution}\nVersion: 1.0\n')
        if module:
            (info / 'top_level.txt').write_text(f'{module}\n')
            (tmp_path / module).mkdir()
            (tmp_path / module / '__init__.py').write_text('')

    return types.SimpleNamespace(path=tmp_path, add=add)


@pytest.fixture
def only(monkeypatch):
    """Makes just the named distributions visible."""

    def limit(*names):
        original = metadata.distribution

        def distribution(name):
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return original(name)

        monkeypatch.setattr(metadata, 'distribution', distribution)

    return limit


@pytest.mark.parametrize(
    ('installed', 'expected'),
    [
        (['onedl-mmsegmentation'], 'onedl-mmsegmentation'),
        (['mmsegmentation'], 'mmsegmentation'),
        (['mmsegmentation', 'onedl-mmsegmentation'], 'mmsegmentation'),
        ([], 'mmsegmentation'),
    ],
)
def test_mmseg_is_named_after_what_is_installed(site, only, installed, expected):
    for name in installed:
        site.add(name)
    only(*installed)
    utils = types.SimpleNamespace(
        MODULE2PACKAGE={'mmseg': 'mmsegmentation', 'mmdet': 'mmdet', 'mmocr': 'mmocr'}
    )
    shim._name_onedl_packages(utils)
    assert {'mmseg': expected, 'mmdet': 'mmdet', 'mmocr': 'mmocr'} == utils.MODULE2PACKAGE


def test_installed_paths(site):
    site.add('onedl-library', 'library')
    site.add('plain', 'plain')
    (site.path / 'loose').mkdir()
    (site.path / 'loose' / '__init__.py').write_text('')
    (site.path / 'namespace').mkdir()
    for package, module in (('onedl-library', 'library'), ('plain', 'plain'), ('loose', 'loose')):
        assert shim.is_installed(package)
        assert shim.get_installed_path(package) == str(site.path / module)
    for package in ('nothing', 'namespace', 'no-thing'):
        assert not shim.is_installed(package)
        with pytest.raises(ImportError, match=f"'{package}' is not installed"):
            shim.get_installed_path(package)


def test_editable_installation(site, tmp_path, monkeypatch):
    """The distribution's folder does not hold the module then."""
    site.add('onedl-edited', 'edited')
    source = tmp_path / 'source'
    source.mkdir()
    (site.path / 'edited').rename(source / 'edited')
    monkeypatch.syspath_prepend(str(source))
    assert shim.get_installed_path('onedl-edited') == str(source / 'edited')


def old_package_utils():
    """As in mmengine 0.10.7."""
    module = types.ModuleType('package_utils')
    source = """
def is_installed(package):
    import pkg_resources
    return bool(pkg_resources.get_distribution(package))


def get_installed_path(package):
    from pkg_resources import get_distribution
    return get_distribution(package).location
"""
    exec(source, vars(module))
    return module


@pytest.mark.parametrize('available', [True, False])
def test_pkg_resources_is_replaced_where_it_is_missing(monkeypatch, available):
    find_spec = importlib.util.find_spec

    def find(name, package=None):
        if name == 'pkg_resources':
            return object() if available else None
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, 'find_spec', find)
    module = old_package_utils()
    # As other modules of mmengine have them, by the time that the shim acts.
    is_installed, get_installed_path = module.is_installed, module.get_installed_path
    code = is_installed.__code__
    shim._replace_pkg_resources(module)
    shim._replace_pkg_resources(module)
    if available:
        assert is_installed.__code__ is code
    else:
        assert is_installed('pytest')
        assert not is_installed('mmnothing')
        assert get_installed_path('pytest').endswith('pytest')


def test_newer_mmengine_keeps_its_own():
    package_utils = pytest.importorskip('mmengine.utils.package_utils')
    module = types.ModuleType('package_utils')
    vars(module).update(is_installed=package_utils.is_installed)
    code = module.is_installed.__code__
    if 'pkg_resources' in code.co_names:
        pytest.skip('mmengine 0.10.7 or older')
    shim._replace_pkg_resources(module)
    assert module.is_installed.__code__ is code
