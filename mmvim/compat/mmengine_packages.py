"""``_base_ = 'mmseg::…'`` with the OneDL packages, and package look-ups without ``pkg_resources``.

Why, first: mmengine (also onedl-mmengine 0.10.12) looks for the distribution ``mmsegmentation``
when a config says ``mmseg::``. With ``onedl-mmsegmentation`` neither a distribution nor a module
has that name, so mmengine reports that mmsegmentation is not installed.

Why, second: mmengine 0.10.7 and earlier find installed packages with ``pkg_resources``, which
setuptools 82 removed; every ``_base_ = 'mm…::…'`` then fails.

How: the entry of mmengine's ``MODULE2PACKAGE`` is set to the distribution that is installed; the
look-ups are replaced by ones on ``importlib.metadata``, only where ``pkg_resources`` is missing.

Obsolete with: a onedl-mmengine that knows its sister packages, and mmengine 0.11.
"""

import importlib.util
import os.path
from importlib import metadata
from types import ModuleType

from ._import_hook import when_imported

_ONEDL = {
    'mmdet': 'onedl-mmdetection',
    'mmpretrain': 'onedl-mmpretrain',
    'mmseg': 'onedl-mmsegmentation',
}


def install() -> None:
    """Act when mmengine's look-up tables and functions are imported."""
    when_imported('mmengine.config.utils', _name_onedl_packages)
    when_imported('mmengine.utils.package_utils', _replace_pkg_resources)


def _name_onedl_packages(utils: ModuleType) -> None:
    for module, onedl in _ONEDL.items():
        known = utils.MODULE2PACKAGE.get(module)
        if known is None or known == module or _distribution_exists(known):
            # A package whose module has its name needs no entry: mmengine tries that name itself.
            continue
        if _distribution_exists(onedl):
            utils.MODULE2PACKAGE[module] = onedl


def _replace_pkg_resources(package_utils: ModuleType) -> None:
    if 'pkg_resources' not in package_utils.is_installed.__code__.co_names:
        return
    if importlib.util.find_spec('pkg_resources') is None:
        # Replace the code, not the function, which other modules may already have imported.
        package_utils.is_installed.__code__ = _call_is_installed.__code__
        package_utils.get_installed_path.__code__ = _call_get_installed_path.__code__


def _call_is_installed(package: str) -> bool:
    from mmvim.compat import mmengine_packages

    return mmengine_packages.is_installed(package)


def _call_get_installed_path(package: str) -> str:
    from mmvim.compat import mmengine_packages

    return mmengine_packages.get_installed_path(package)


def _distribution_exists(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def is_installed(package: str) -> bool:
    """Whether ``package`` is an installed distribution or an importable regular package."""
    return _distribution_exists(package) or _module_directory(package) is not None


def get_installed_path(package: str) -> str:
    """Directory of the module that belongs to the distribution or module ``package``.

    Raises:
        ImportError: There is no such distribution or module.
    """
    names = [package]
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        pass
    else:
        names += (distribution.read_text('top_level.txt') or '').split()
        for name in names:
            path = str(distribution.locate_file(name))
            if os.path.isdir(path):
                return path
    for name in names:
        path = _module_directory(name)
        if path is not None:
            return path
    raise ImportError(f'package {package!r} is not installed')


def _module_directory(name: str) -> str | None:
    if not name.isidentifier():
        return None
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) if spec is not None and spec.origin else None
