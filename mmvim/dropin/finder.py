"""Import machinery: where the names come from, and when ours stand in.

The modules lie in ``packages/`` under the names by which they are imported, so a folder at the end
of ``sys.path`` offers each of them where no real one is found; child processes inherit it. A finder
deals with what a path cannot tell: extensions that do not load, and Triton code that cannot run.

Standard library only: ``MMVIM_DROPIN=1`` loads this file when Python starts.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

#: The folder with the modules.
PACKAGES = str(Path(__file__).resolve().parent / 'packages')
#: Packages in Python, and the extension without which the released ones do not work.
_EXTENSION_OF = {'causal_conv1d': 'causal_conv1d_cuda', 'mamba_ssm': 'selective_scan_cuda'}
_EXTENSIONS = (
    'selective_scan_cuda',
    'selective_scan_cuda_core',
    'selective_scan_cuda_oflex',
    'selective_scan_cuda_oflex_rh',
    'selective_scan_cuda_ndstate',
    'selective_scan_cuda_nrow',
    'causal_conv1d_cuda',
)
#: The top-level names that can be provided.
NAMES = (*_EXTENSIONS, *_EXTENSION_OF, 'selective_scan', 'csm_triton')
#: Files in Triton that projects copy into packages of other names, and functions in them.
_TRITON_FILES = (
    'layer_norm',
    'layernorm',
    'layernorm_gated',
    'selective_state_update',
    'ssd_combined',
)
_IN_TRITON = re.compile(
    r'^def (layer_norm_fn|layernorm_fn|selective_state_update|mamba_chunk_scan_combined)\b',
    re.MULTILINE,
)
#: Files of forks that only work with the release of transformers of their time.
_ON_TRANSFORMERS = ('mamba_ssm.utils.generation', 'mamba_ssm.utils.hf')
VARIABLE = 'MMVIM_DROPIN'


class Status(NamedTuple):
    """Origin of a name.

    Attributes:
        name: The name, such as ``'mamba_ssm'``.
        state: ``'installed'``, the real package; ``'provided'``, mmvim's; ``'shadowed'``, a file of
            the user's, outside of the folders for installed packages; ``'missing'``, nothing, as
            the drop-in is not in place.
        detail: The file, and why an installed package is not used.
    """

    name: str
    state: str
    detail: str


class _Loaded(Loader):
    """Hands out a module that has been executed already."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Placeholders(Loader):
    """Makes modules whose names can be imported and raise when they are used."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        placeholders = importlib.import_module('mmvim.dropin.placeholders')
        module.__getattr__ = placeholders.attributes_of(module.__name__)


class _OursOnError(SourceFileLoader):
    """Executes somebody's file, and ours in its place if an import in it fails."""

    def exec_module(self, module: ModuleType) -> None:
        before = dict(vars(module))
        try:
            super().exec_module(module)
        except ImportError as error:
            name = module.__name__
            warnings.warn(
                f'{self.path} fails to load, so mmvim stands in for {name}: {error}',
                RuntimeWarning,
                stacklevel=2,
            )
            vars(module).clear()
            vars(module).update(before)
            ours = _ours(name)
            module.__spec__, module.__loader__, module.__file__ = ours, ours.loader, ours.origin
            ours.loader.exec_module(module)


class _Finder(MetaPathFinder):
    """First on ``sys.meta_path`` while the drop-in is in place."""

    # An attribute, not the class, tells a finder: the hook for MMVIM_DROPIN loads this file apart
    # from the package, so that there may be two classes.
    mmvim_dropin = True

    def __init__(self, override: bool) -> None:
        self.override = override
        self._probed: dict[str, ModuleType | Exception] = {}
        self._lock = threading.RLock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in NAMES:
            if self.override:
                return _ours(fullname)
            spec = _theirs(fullname)
            if spec is None:
                return None  # The folder at the end of sys.path has it.
            if fullname == 'csm_triton':
                return self._instead_of_triton(fullname, [str(Path(spec.origin).parent)])
            error = self.failure(fullname, spec)
            if error is not None:
                warnings.warn(
                    f'{fullname} is installed ({spec.origin}) but fails to load, so mmvim stands '
                    f'in for it: {type(error).__name__}: {error}',
                    RuntimeWarning,
                    stacklevel=2,
                )
                return _ours(fullname)
            if fullname in self._probed:
                spec.loader = _Loaded(self._probed[fullname])
            return spec
        root = fullname.partition('.')[0]
        if root in _EXTENSION_OF and _is_ours(sys.modules.get(root)):
            return _ours(fullname) or _placeholders(fullname)
        if _counterpart(fullname) in _ON_TRANSFORMERS:
            theirs = PathFinder.find_spec(fullname, path)
            if theirs is not None and isinstance(theirs.loader, SourceFileLoader):
                theirs.loader = _OursOnError(fullname, theirs.origin)
            return theirs
        return self._instead_of_triton(fullname, path)

    def _instead_of_triton(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        """Ours for a file of somebody's that needs Triton, where that cannot run."""
        ours = _counterpart(fullname)
        if ours != 'csm_triton' and not ours.startswith('mamba_ssm.ops.triton.'):
            return None
        if self.override and ours == 'csm_triton':
            return _ours(fullname)
        theirs = PathFinder.find_spec(fullname, path)
        in_fork = 'mamba_ssm' in fullname.split('.')
        if theirs is None:
            # Another one of ours imports it.
            return _ours(fullname) if in_fork and not _triton_runs() else None
        if not _imports_triton(theirs):
            return None
        if ours != 'csm_triton' and not in_fork and not _is_copy(theirs):
            return None
        # Last, as it imports torch.
        return None if _triton_runs() else _ours(fullname) or _placeholders(fullname)

    def failure(self, name: str, spec: ModuleSpec) -> Exception | None:
        """The reason why an installed package counts as absent."""
        if name in _EXTENSION_OF:
            if not _is_installed(spec):
                return None
            name = _EXTENSION_OF[name]
            spec = _theirs(name)
            if spec is None:
                return None
        if not isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
            return None
        with self._lock:
            if name not in self._probed:
                self._probed[name] = _load(spec)
            result = self._probed[name]
        return result if isinstance(result, Exception) else None


def _load(spec: ModuleSpec) -> ModuleType | Exception:
    """Execute an extension."""
    importlib.import_module('torch')  # whose libraries it is linked to
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        return error
    return module


def _is_dropin(finder: object) -> bool:
    return getattr(finder, 'mmvim_dropin', False) is True


def _ours(name: str) -> ModuleSpec | None:
    parents = _counterpart(name).split('.')[:-1]
    return PathFinder.find_spec(name, [os.path.join(PACKAGES, *parents)])


def _counterpart(name: str) -> str:
    """The name that somebody's module would have among ours: forks lie in other packages, too."""
    parts = name.split('.')
    if parts[-1] == 'csm_triton':
        return parts[-1]
    if 'mamba_ssm' in parts:
        return '.'.join(parts[parts.index('mamba_ssm') :])
    if len(parts) > 1 and parts[-1] in _TRITON_FILES:
        return f'mamba_ssm.ops.triton.{parts[-1]}'
    return name


def _placeholders(name: str) -> ModuleSpec:
    return ModuleSpec(name, _Placeholders(), is_package=True)


def _theirs(name: str) -> ModuleSpec | None:
    """The spec of a name without the drop-in."""
    paths = [entry for entry in sys.path if entry != PACKAGES]
    for finder in list(sys.meta_path):
        if _is_dropin(finder) or not hasattr(finder, 'find_spec'):
            continue
        spec = finder.find_spec(name, paths if finder is PathFinder else None)
        # A folder without code that happens to have the name is no package.
        if spec is not None and spec.loader is not None and spec.origin is not None:
            return spec
    return None


def _is_installed(spec: ModuleSpec) -> bool:
    return bool({'site-packages', 'dist-packages'} & set(Path(spec.origin).parts))


@functools.cache
def _triton_runs() -> bool:
    """Whether code in Triton can run: it needs the package and a GPU."""
    if importlib.util.find_spec('triton') is None:
        return False
    torch = importlib.import_module('torch')
    return torch.cuda.is_available() or (hasattr(torch, 'xpu') and torch.xpu.is_available())


def _imports_triton(spec: ModuleSpec) -> bool:
    if not isinstance(spec.loader, SourceFileLoader):
        return False
    source = spec.loader.get_source(spec.name)
    return re.search(r'^\s*(import|from)\s+triton\b', source, re.MULTILINE) is not None


def _is_copy(spec: ModuleSpec) -> bool:
    """Whether a file of the user's defines a function of mamba_ssm's Triton modules."""
    source = spec.loader.get_source(spec.name)
    return not _is_installed(spec) and _IN_TRITON.search(source) is not None


def _active() -> _Finder | None:
    return next((f for f in sys.meta_path if _is_dropin(f)), None)


def _is_ours(module: object) -> bool:
    if isinstance(getattr(getattr(module, '__spec__', None), 'loader', None), _Placeholders):
        return True
    file = getattr(module, '__file__', None)
    return isinstance(file, str) and file.startswith(PACKAGES + os.sep)


def install(override: bool = False) -> None:
    """Make the names importable where the real packages are missing.

    A second call changes nothing but ``override``. Names that were imported before stay what they
    are.

    Args:
        override: Whether mmvim also stands in for packages that are installed, and for packages of
            these names in the user's own folders.

    Raises:
        TypeError: ``override`` is neither True nor False.
        RuntimeError: With ``override``, if a real package has been imported already.
    """
    if not isinstance(override, bool):
        raise TypeError(f'override must be True or False, got {override!r}')
    if override:
        early = [n for n in NAMES if n in sys.modules and not _is_ours(sys.modules[n])]
        if early:
            raise RuntimeError(
                f'{", ".join(early)}: imported before mmvim.dropin.install(override=True), which '
                'therefore comes too late; call it first'
            )
    finder = _active()
    if finder is None:
        sys.meta_path.insert(0, _Finder(override))
    else:
        finder.override = override
    if PACKAGES not in sys.path:
        sys.path.append(PACKAGES)
    importlib.invalidate_caches()


def uninstall() -> None:
    """Undo :func:`install`: the names that mmvim provided can no longer be imported.

    Objects that were imported from them keep working.
    """
    sys.meta_path[:] = [f for f in sys.meta_path if not _is_dropin(f)]
    sys.path[:] = [entry for entry in sys.path if entry != PACKAGES]
    for entry in [entry for entry in sys.path_importer_cache if entry.startswith(PACKAGES)]:
        del sys.path_importer_cache[entry]
    for name in [n for n, module in sys.modules.items() if _is_ours(module)]:
        module = sys.modules.pop(name)
        parent, _, attribute = name.rpartition('.')
        owner = sys.modules.get(parent)
        # Only owners of others: whoever holds one of ours keeps its submodules.
        others = owner is not None and not _is_ours(owner)
        if others and vars(owner).get(attribute) is module:
            delattr(owner, attribute)
    importlib.invalidate_caches()


def status() -> list[Status]:
    """Say for each name where it comes from; imports none of them but to try extensions."""
    finder = _active()
    return [_status(name, finder) for name in NAMES]


def _status(name: str, finder: _Finder | None) -> Status:
    spec = _theirs(name)
    offered = 'provided' if finder is not None else 'missing'
    if spec is None:
        return Status(name, offered, _ours(name).origin if finder is not None else '')
    if finder is not None and finder.override:
        return Status(name, 'provided', f'instead of {spec.origin}')
    error = (finder or _Finder(override=False)).failure(name, spec)
    if error is not None:
        return Status(name, offered, f'{spec.origin} fails to load: {error}')
    state = 'installed' if _is_installed(spec) else 'shadowed'
    return Status(name, state, spec.origin)


def install_from_environment() -> None:
    """Call :func:`install` if ``MMVIM_DROPIN`` is 1, or ``override``."""
    value = os.environ.get(VARIABLE, '')
    if value in ('1', 'override'):
        install(override=value == 'override')
    elif value not in ('', '0'):
        raise ValueError(f'{VARIABLE}={value!r} is unknown; allowed: 0, 1, override')
