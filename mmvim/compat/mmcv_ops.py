"""``mmcv._ext`` from torchvision and PyTorch when, and only when, mmcv has no compiled ops.

Why: the mmcv on the package index is a source distribution whose build, isolated from torch,
silently omits the compiled ops; building them takes over an hour on two cores, and binary wheels
exist only for a few combinations of Python, torch and CUDA. Without ``mmcv._ext`` the import
of ``mmcv.ops``, and with it every two-stage detector, fails.

How: a finder at the *end* of ``sys.meta_path`` answers for ``mmcv._ext``. A real extension is
found first and wins. The functions are in :mod:`mmvim.compat.mmcv_ext`; an op that is not among
them can be imported and raises when it is called.

Obsolete with: an mmcv (or onedl-mmcv, 2.3.6 at the time of writing) whose wheels carry compiled ops
for every supported torch.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

NAME = 'mmcv._ext'


class _ExtFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        return importlib.util.spec_from_loader(fullname, _ExtLoader(), origin='mmvim.compat')


class _ExtLoader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        from mmvim.compat import mmcv_ext

        mmcv_ext.populate(module)


def install() -> None:
    """Append the finder for ``mmcv._ext`` to ``sys.meta_path``, once."""
    if not any(isinstance(finder, _ExtFinder) for finder in sys.meta_path):
        sys.meta_path.append(_ExtFinder())


def is_compiled() -> bool:
    """Whether mmcv has its own compiled ops (imports mmcv, but not its ops).

    Raises:
        ModuleNotFoundError: mmcv is not installed.
    """
    spec = importlib.util.find_spec(NAME)
    return spec is not None and not isinstance(spec.loader, _ExtLoader)
