"""mmpretrain together with transformers 5, without its multi-modal models.

Why: mmpretrain (onedl-mmpretrain 1.3.6 at the time of writing) imports its multi-modal models, and
with them names that transformers 5 no longer has, whenever transformers >= 4.28 is installed. The
import of ``mmpretrain.models`` then fails, even for users of an image classifier.

How: ``WITH_MULTIMODAL`` of ``mmpretrain.utils.dependency`` decides, and is set to False as soon as
that module has been imported. The placeholders that mmpretrain then registers for those models get
an error message with the reason.

Obsolete with: an mmpretrain that supports transformers 5.
"""

from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import NoReturn

from ._import_hook import when_imported


def install() -> None:
    """Act when ``mmpretrain.utils.dependency`` is imported."""
    when_imported('mmpretrain.utils.dependency', _patch)


def _patch(dependency: ModuleType) -> None:
    try:
        version = metadata.version('transformers')
    except metadata.PackageNotFoundError:
        return
    if not dependency.WITH_MULTIMODAL or int(version.partition('.')[0]) < 5:
        return

    def register_multimodal_placeholder(names: Sequence[str], registry: object) -> None:
        for name in names:
            registry.register_module(name=name, module=_placeholder(name, version))

    dependency.WITH_MULTIMODAL = False
    dependency.register_multimodal_placeholder = register_multimodal_placeholder


def _placeholder(name: str, version: str) -> object:
    def unavailable(*args: object, **kwargs: object) -> NoReturn:
        raise ImportError(
            f"mmpretrain's {name} does not work with transformers {version}: "
            "pip install 'transformers<5'"
        )

    return unavailable
