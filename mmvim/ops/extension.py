"""Finding, loading and, on request, compiling the library of kernels.

The library is inside the package if it was built with it, else in this user's cache if
:func:`build` made it. A description accompanies each, which is loaded only into the torch that it
was compiled against. Without a library every op runs on its PyTorch implementation.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_DTYPES = {
    'cpu': (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    'cuda': (torch.float32, torch.bfloat16, torch.float16),
}
_HOW = (
    '`python -c "import mmvim.ops; mmvim.ops.build()"` compiles them now, MMVIM_JIT=1 at first '
    'use, and `pip install --no-build-isolation` with mmvim'
)

_lock = threading.RLock()
_library: Path | None = None
_info: dict = {}
_reason = 'load() has not been called'
_supported: dict[tuple[str, str], tuple[torch.dtype, ...]] = {}
_jit_tried = False
_gpus_checked = False


class BackendInfo(dict):
    """Description of the compiled kernels; ``str()`` makes it readable."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return '\n'.join(f'{key + ":":<{width + 1}} {_text(value)}' for key, value in self.items())


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ', '.join(map(str, value)) or 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    return 'none' if value is None else str(value)


def load() -> bool:
    """Load the compiled library if there is one that fits this torch.

    Never raises: if the library is missing or does not fit, :func:`why_not` has the reason.

    Returns:
        Whether the library is loaded.
    """
    global _reason
    with _lock:
        if _library is not None:
            return True
        try:
            _reason = _load_first([_PACKAGE, *_cached_folders()])
        except Exception as error:
            _reason = f'looking for them failed: {error}'
        return _library is not None


def loaded() -> bool:
    """Whether the compiled library is loaded."""
    return _library is not None


def supports(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a compiled kernel of ``op`` exists for this device type and dtype.

    With ``MMVIM_JIT=1`` and no library, the first call compiles one.
    """
    if _library is None and not _jit_tried and os.environ.get('MMVIM_JIT', '0') == '1':
        _build_at_first_use()
    if device_type == 'cuda' and not _gpus_checked:
        _check_gpus()
    return dtype in _supported.get((op, device_type), ())


def why_not() -> str:
    """The reason why compiled kernels are missing, and the remedy; for error messages."""
    if _library is None:
        return f'{_reason}; {_HOW}'
    devices = sorted({device for _, device in _supported})
    no_cuda = _info.get('no_cuda')
    detail = f' (no CUDA kernels: {no_cuda})' if no_cuda else ''
    return f'the compiled library has kernels for {", ".join(devices) or "no device"}{detail}'


def backend_info() -> BackendInfo:
    """Describe the compiled kernels, their devices, or the reason why there are none.

    Returns:
        A dict with the keys ``loaded``, ``library`` (path), ``reason`` (None when loaded),
        ``torch`` (version), ``compiler``, ``cpu_kernels``, ``cpu_dtypes``, ``cuda_kernels`` and
        ``cuda_dtypes``, ``cpu_instruction_set`` (the one in use), ``cuda_architectures``,
        ``no_cuda`` (why there are no CUDA kernels), ``cache`` (where :func:`build` puts
        libraries). ``str()`` makes it readable.
    """
    _check_gpus()
    info = BackendInfo(
        loaded=_library is not None,
        library=None if _library is None else str(_library),
        reason=None if _library is not None else why_not(),
        torch=torch.__version__,
        compiler=_info.get('compiler'),
    )
    for device, dtypes in _DTYPES.items():
        ops = sorted(op for op, where in _supported if where == device)
        info[f'{device}_kernels'] = ops
        info[f'{device}_dtypes'] = [str(d).removeprefix('torch.') for d in dtypes] if ops else []
    info['cpu_instruction_set'] = _instruction_set()
    info['cuda_architectures'] = _info.get('architectures', [])
    info['no_cuda'] = _info.get('no_cuda') or None
    try:
        info['cache'] = str(_cache_root())
    except OSError as error:
        info['cache'] = f'unusable: {error}'
    return info


def build(verbose: bool = True, cuda: bool | None = None) -> Path:
    """Compile the kernels for this torch into this user's cache, and load them.

    An earlier build is reused. Of several processes that build at the same time, one builds.

    Args:
        verbose: Print progress to stderr.
        cuda: True requires the CUDA kernels (needs nvcc, but no GPU), False omits them, None
            builds them if there are nvcc and a GPU, or with ``MMVIM_FORCE_CUDA=1``.
            ``TORCH_CUDA_ARCH_LIST`` chooses the architectures, ``MAX_JOBS`` the number of
            compilers, ``MMVIM_CACHE_DIR`` the cache.

    Returns:
        The library in use. If one is already loaded it stays: a process cannot exchange it.

    Raises:
        RuntimeError: If it cannot be built, with the reason.
    """

    def report(line: str) -> None:
        if verbose:
            print(line, file=sys.stderr, flush=True)

    with _lock:
        if load() and (cuda is not True or _info.get('cuda')):
            report(f'mmvim: the compiled kernels are loaded already: {_library}')
            return _library
        builder = _builder()
        config, _ = builder.find_cuda(cuda)
        variant = 'cpu' if config is None else 'cuda-' + '-'.join(config.architectures)
        folder = _cache_root() / _cache_key(builder, config is not None) / variant
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        with _file_lock(folder.with_name(f'{variant}.lock'), report):
            reason = _problem(folder)
            if reason is not None:
                # Remains of killed builds; no other process builds this variant now.
                for leftover in folder.parent.glob(f'building.{variant}.*'):
                    shutil.rmtree(leftover, ignore_errors=True)
                with tempfile.TemporaryDirectory(
                    prefix=f'building.{variant}.', dir=folder.parent
                ) as scratch:
                    new = Path(scratch)
                    objects = new / 'objects'
                    builder.build(new, cuda=config is not None, report=report, objects=objects)
                    folder.mkdir(mode=0o700, exist_ok=True)
                    # The description comes last: without a matching one a library is not loaded.
                    (folder / builder.INFO_NAME).unlink(missing_ok=True)
                    for name in (builder.ONNX_NAME, builder.LIBRARY_NAME, builder.INFO_NAME):
                        _write_to_disk(new / name)
                        os.replace(new / name, folder / name)
        if _library is not None:
            raise RuntimeError(
                f'{folder} is built, but this process has loaded {_library} already: start it again'
            )
        reason = _load_first([folder])
        if _library is None:
            raise RuntimeError(f'the kernels were built but cannot be loaded: {reason}')
        return _library


def _build_at_first_use() -> None:
    global _jit_tried, _reason
    with _lock:
        if _jit_tried or _library is not None:
            return
        _jit_tried = True
        try:
            build()
        except Exception as error:
            _reason = f'MMVIM_JIT=1, but {error}'
            warnings.warn(f'mmvim goes on with PyTorch operators: {_reason}', stacklevel=4)


def _load_first(folders: list[Path]) -> str:
    """Load the first library that fits; return why the first did not."""
    global _library, _info
    reasons = []
    for folder in folders:
        reason = _problem(folder)
        if reason is None:
            path = folder / _library_name()
            try:
                torch.ops.load_library(str(path))
            except Exception as error:
                reasons.append(f'{path} cannot be loaded: {error}')
                continue
            _library, _info = path, _read_info(folder)
            _find_kernels()
            return ''
        reasons.append(reason)
    return reasons[0] if reasons else 'there is no compiled library'


def _problem(folder: Path) -> str | None:
    """The reason why the library of ``folder`` cannot be used, or None."""
    info = _read_info(folder)
    if 'error' in info:
        return f'the kernels were not compiled: {info["error"]}'
    if not info or not (folder / _library_name()).is_file():
        return 'the kernels have not been compiled'
    if info.get('torch') != torch.__version__:
        return (
            f'the kernels were compiled for torch {info.get("torch")} and this is '
            f'{torch.__version__}'
        )
    size = (folder / _library_name()).stat().st_size
    if info.get('bytes', size) != size:
        return f'the library has {size} bytes, not {info["bytes"]}: it is damaged'
    try:
        builder = _builder()
    except RuntimeError:
        return None  # there are no sources that could differ
    if info.get('sources') != builder.sources_hash(bool(info.get('cuda'))):
        return 'the sources in csrc have changed since the kernels were compiled'
    return None


def _read_info(folder: Path) -> dict:
    try:
        return json.loads((folder / '_build_info.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}


def _library_name() -> str:
    return '_C.pyd' if os.name == 'nt' else '_C.so'


def _find_kernels() -> None:
    """Ask the dispatcher what the library registered."""
    global _gpus_checked
    for device, key in (('cpu', 'CPU'), ('cuda', 'CUDA')):
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
            namespace, _, op = name.partition('::')
            # The gradients of an op are not chosen separately.
            if namespace == 'mmvim' and not op.endswith('_backward'):
                _supported[op, device] = _DTYPES[device]
    _gpus_checked = False


def _check_gpus() -> None:
    """Do not use the CUDA kernels if there is a GPU that they have no code for.

    Checked at their first use, not on loading: querying a GPU initialises CUDA, and a process that
    has initialised CUDA cannot be forked into others that use it.
    """
    global _gpus_checked
    with _lock:
        if _gpus_checked:
            return
        if any(device == 'cuda' for _, device in _supported) and not _gpu_is_covered():
            for key in [key for key in _supported if key[1] == 'cuda']:
                del _supported[key]
        _gpus_checked = True


def _gpu_is_covered() -> bool:
    """Whether the library holds code for every GPU of this machine (or there is none)."""
    if not torch.cuda.is_available():
        return True
    architectures = _info.get('architectures', [])
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if not any(_covers(entry, major, minor) for entry in architectures):
            _info['no_cuda'] = (
                f'compiled for {", ".join(architectures)}, but GPU {i} is {major}.{minor}'
            )
            return False
    return True


def _covers(entry: str, major: int, minor: int) -> bool:
    number = entry.removesuffix('+PTX').rstrip('af')
    of_major, of_minor = map(int, number.split('.'))
    if of_major == major and of_minor <= minor:
        return True
    return entry.endswith('+PTX') and (of_major, of_minor) <= (major, minor)


def _instruction_set() -> str | None:
    if _library is None:
        return None
    function = ctypes.CDLL(str(_library)).mmvim_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def _builder() -> ModuleType:
    """csrc/build.py: next to the package in a checkout, inside it once installed."""
    for root in (_PACKAGE / 'csrc', _PACKAGE.parent / 'csrc'):
        path = root / 'build.py'
        if path.is_file():
            name = 'mmvim_csrc_build'
            if name not in sys.modules or Path(sys.modules[name].__file__) != path:
                spec = importlib.util.spec_from_file_location(name, path)
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
            return sys.modules[name]
    raise RuntimeError(f'the sources (csrc) are neither in {_PACKAGE} nor next to it')


def _cache_key(builder: ModuleType, cuda: bool) -> str:
    version = torch.__version__.replace('+', '-')
    return f'torch{version}-{platform.machine()}-{builder.sources_hash(cuda)[:12]}'


def _cache_root() -> Path:
    """A folder that only this user can write: code is loaded from it.

    Raises:
        OSError: If there is none.
    """
    chosen = os.environ.get('MMVIM_CACHE_DIR')
    if chosen:
        return _private(Path(chosen).expanduser())
    if os.name == 'nt':
        base = Path(os.environ.get('LOCALAPPDATA', tempfile.gettempdir()))
    else:
        base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    try:
        return _private(base / 'mmvim')
    except OSError:
        user = os.getuid() if hasattr(os, 'getuid') else 'user'
        return _private(Path(tempfile.gettempdir()) / f'mmvim-{user}')


def _write_to_disk(path: Path) -> None:
    """Flush a file to disk before it gets its name: a crash must not leave an empty one."""
    with open(path, 'r+b') as file:
        os.fsync(file.fileno())


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f'{folder} cannot be written')
    if os.name != 'nt':
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f'{folder} can be written by others (chmod 700 it)')
    return folder


def _cached_folders() -> list[Path]:
    """Libraries of :func:`build` for this torch and these sources, the best one first."""
    try:
        builder, root = _builder(), _cache_root()
    except (RuntimeError, OSError):
        return []
    cuda = sorted((root / _cache_key(builder, True)).glob('cuda-*/'))
    cpu = [root / _cache_key(builder, False) / 'cpu']
    found = cuda + cpu if cuda and torch.cuda.is_available() else cpu + cuda
    return [folder for folder in found if (folder / _library_name()).is_file()]


@contextlib.contextmanager
def _file_lock(path: Path, report) -> Iterator[None]:
    """Hold an exclusive lock, which the system releases however the process ends."""
    with open(path, 'a+b') as file:
        if os.name == 'nt':
            import msvcrt

            file.seek(0)
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:  # ten seconds have passed
                    report('mmvim: waiting for another process that compiles the kernels')
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                report('mmvim: waiting for another process that compiles the kernels')
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
