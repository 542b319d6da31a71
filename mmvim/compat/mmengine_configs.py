"""``_base_ = 'mmvim::vim/…'`` and ``mmengine.hub.get_config('mmvim::vim/…')``.

Why: mmengine looks up other packages' configs in a list of known packages, and expects them in
``<package>/.mim/configs``. That is where an installed mmvim has them; in a source checkout or an
editable installation they are at the top of the repository, and merely importing a package must not
write files there. mmengine also gives every part of such a base config the scope ``mmvim``, in
which the types of mmdet, mmseg and mmpretrain in our configs would not be found.

How: mmvim is added to the list, and the functions that join the paths answer for mmvim themselves.
Its base configs keep the scope of the config that includes them. Other packages are unaffected.

Obsolete with: nothing in sight; mmengine has no way to register a package's configs.
"""

import os.path
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ._import_hook import replaces, when_imported

PACKAGE = Path(__file__).resolve().parents[1]


def install() -> None:
    """Act when mmengine's config modules are imported."""
    when_imported('mmengine.config.utils', _add_package)
    for name in ('mmengine.config.utils', 'mmengine.config.config', 'mmengine.hub.hub'):
        when_imported(name, _patch_lookups)
    when_imported('mmengine.config.config', _keep_scope)


def root() -> Path:
    """The folder with ``configs/``: the repository of a checkout, else ``mmvim/.mim``.

    Raises:
        FileNotFoundError: Neither exists: the package was built without its configs.
    """
    checkout, installed = PACKAGE.parent, PACKAGE / '.mim'
    if (checkout / 'pyproject.toml').is_file() and (checkout / 'configs').is_dir():
        return checkout
    if (installed / 'configs').is_dir():
        return installed
    raise FileNotFoundError(f"mmvim's configs are missing: no folder {installed / 'configs'}")


def config_path(name: str) -> Path:
    """Path of a config of mmvim.

    Args:
        name: Path below ``configs/``, such as ``'vim/vim-tiny_8xb128_in1k.py'``.

    Raises:
        FileNotFoundError: There is no such config; the message lists those of the folder.
    """
    folder = root() / 'configs'
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FileNotFoundError(f"mmvim has no config '{name}': it lies outside of {folder}")
    if path.is_file():
        return path
    siblings = sorted(p.name for p in path.parent.glob('*.py'))
    hint = f'; {path.parent} has {", ".join(siblings)}' if siblings else ''
    raise FileNotFoundError(f"mmvim has no config '{name}'{hint}")


def _add_package(utils: ModuleType) -> None:
    utils.MODULE2PACKAGE.setdefault('mmvim', 'mmvim')


def _is_mmvim(package_path: str) -> bool:
    # By name: another mmvim may be installed in addition to the running checkout.
    return os.path.basename(os.path.normpath(package_path)) == PACKAGE.name


def _patch_lookups(module: ModuleType) -> None:
    if hasattr(module, '_get_external_cfg_base_path'):

        @replaces(module, '_get_external_cfg_base_path')
        def base_path(original: Callable, package_path: str, cfg_name: str) -> str:
            if _is_mmvim(package_path):
                return str(config_path(cfg_name))
            return original(package_path, cfg_name)

    if hasattr(module, '_get_cfg_metainfo'):

        @replaces(module, '_get_cfg_metainfo')
        def metainfo(
            original: Callable[[str, str], dict], package_path: str, cfg_path: str
        ) -> dict:
            return (
                _metainfo(cfg_path) if _is_mmvim(package_path) else original(package_path, cfg_path)
            )


def _metainfo(cfg_path: str) -> dict:
    from mmengine.fileio import load

    base = root()
    index = base / 'model-index.yml'
    metafiles = load(index)['Import'] if index.is_file() else []
    for metafile in metafiles:
        for model in load(base / metafile).get('Models', []):
            if model.get('Config') == f'configs/{cfg_path}':
                # Absolute: the callers join it with a folder that does not exist in a checkout.
                return {**model, 'Config': str(base / model['Config'])}
    # mmengine's convention for a config without metadata: it then uses the path itself.
    raise ValueError(f"no metafile of mmvim describes '{cfg_path}'")


def _keep_scope(config: ModuleType) -> None:
    @replaces(config.Config, '_get_cfg_path')
    def get_cfg_path(original: Callable, cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = original(cfg_path, filename)
        return path, None if scope == 'mmvim' else scope
