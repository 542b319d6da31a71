"""Compilation of this folder's sources into two shared libraries.

The only place that knows sources, flags and tools. setup.py uses it (library inside the package),
``mmvim.ops.build()`` uses it (library in a cache), and ``python csrc/build.py`` compiles by hand or
checks that the CUDA sources compile. Needs torch and a C++ compiler; nvcc for the CUDA kernels, but
no GPU. The library registers kernels with torch's dispatcher and knows nothing of Python; the one
for ONNX Runtime contains the scan alone and knows nothing of torch either.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
WINDOWS = os.name == 'nt'
MACOS = sys.platform == 'darwin'
X86 = platform.machine().lower() in ('x86_64', 'amd64')

LIBRARY_NAME = '_C.pyd' if WINDOWS else '_C.so'
ONNX_NAME = '_onnx.dll' if WINDOWS else '_onnx.so'
INFO_NAME = '_build_info.json'

# The CPU kernels are compiled once for each of these; the best one is chosen at run time.
_ISA_FLAGS = {
    'portable': ((), ()),
    'avx2': (('-mavx2', '-mfma', '-mf16c'), ('/arch:AVX2',)),
    'avx512': (
        ('-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mavx2', '-mfma', '-mf16c'),
        ('/arch:AVX512',),
    ),
}
_CXX_FLAGS = ('-O3', '-fPIC', '-fvisibility=hidden', '-DNDEBUG', '-ffp-contract=fast', '-Wno-psabi')
# From torch.utils.cpp_extension: options of MSVC that its headers need.
_MSVC_FLAGS = (
    *('/nologo', '/O2', '/MD', '/EHsc', '/DNDEBUG', '/DNOMINMAX', '/bigobj', '/permissive-'),
    *('/Zc:__cplusplus', '/wd4819', '/wd4251', '/wd4244', '/wd4267', '/wd4275', '/wd4018'),
    *('/wd4190', '/wd4624', '/wd4067', '/wd4068'),
)
_NVCC_FLAGS = ('-O3', '-std=c++17')
# Not worth the slow optimisation of -O3, like the glue: the outer loops of the scan.
_O2_KERNELS = ('selective_scan/cpu_scan.cpp',)

# What the library for ONNX Runtime shares with torch's.
_FOR_ONNX = re.compile(
    r'common/(isa|cpu_.*)\.cpp|selective_scan/(cpu_.*\.cpp|cuda_(forward_float|shared)\.cu)'
)

_NAMED_ARCHITECTURES = {
    'Turing': '7.5+PTX',
    'Ampere': '8.0;8.6+PTX',
    'Ada': '8.9+PTX',
    'Hopper': '9.0+PTX',
    'Blackwell': '10.0;12.0+PTX',
}
_DEFAULT_ARCHITECTURES = ('7.5', '8.0', '8.6', '8.9', '9.0', '10.0', '12.0')
# nvcc 13 compiles causal convolutions for sm_103 to code that computes wrong results, code for
# sm_100 is right and runs on the same GPUs: https://github.com/Dao-AILab/causal-conv1d/issues/105
_MISCOMPILED = {'10.3': '10.0'}
_MISCOMPILING_CUDA = '13'

Report = Callable[[str], None]


class BuildError(RuntimeError):
    """The library cannot be built; the message says why."""


@dataclass(frozen=True)
class Unit:
    """One call of a compiler."""

    source: str
    isa: str = ''

    @property
    def kind(self) -> str:
        """Kind of compilation, by its name.

        ``*.cu`` are 'cuda' kernels, ``cuda*.cpp`` the 'cuda-glue' that calls them; ``cpu_*.cpp``
        are CPU 'kernel', any other ``.cpp`` is 'glue' that calls them. ``onnx*.cpp`` and
        ``onnx_cuda*.cpp`` call them for ONNX Runtime. Only the two kinds of glue include headers of
        torch.
        """
        name = self.source.rpartition('/')[2]
        if name.endswith('.cu'):
            return 'cuda'
        if name.startswith('onnx'):
            return 'onnx-cuda' if name.startswith('onnx_cuda') else 'onnx'
        if name.startswith('cuda'):
            return 'cuda-glue'
        return 'kernel' if name.startswith('cpu_') else 'glue'

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that it is linked into."""
        if self.kind.startswith('onnx'):
            return (ONNX_NAME,)
        return (LIBRARY_NAME, ONNX_NAME) if _FOR_ONNX.fullmatch(self.source) else (LIBRARY_NAME,)

    @property
    def label(self) -> str:
        """Name of the unit for the user."""
        return f'{self.source} ({self.isa})' if self.isa else self.source


@dataclass(frozen=True)
class CudaConfig:
    """nvcc and its target architectures."""

    nvcc: Path
    home: Path
    architectures: tuple[str, ...]


def isas() -> tuple[str, ...]:
    """Instruction sets that this machine's compiler can target."""
    return tuple(_ISA_FLAGS) if X86 else ('portable',)


def units(cuda: bool) -> list[Unit]:
    """Everything to compile, the slowest first."""
    kinds = ('glue', 'kernel', 'onnx')
    if cuda:
        kinds = ('cuda', 'cuda-glue', 'onnx-cuda', *kinds)
    found = [Unit(_relative(p)) for p in sorted(ROOT.rglob('*')) if p.suffix in ('.cpp', '.cu')]
    return [
        Unit(unit.source, isa)
        for kind in kinds
        for unit in found
        if unit.kind == kind
        for isa in (isas() if kind == 'kernel' else ('',))
    ]


def sources_hash(cuda: bool) -> str:
    """A hash that changes with the sources and the flags."""
    flags = (_CXX_FLAGS, _MSVC_FLAGS, _ISA_FLAGS, _NVCC_FLAGS, _O2_KERNELS)
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(ROOT.rglob('*')):
        if path.suffix not in ('.h', '.cpp', '.cu', '.cuh'):
            continue
        if cuda or not (path.suffix in ('.cu', '.cuh') or re.match('(onnx_)?cuda', path.name)):
            digest.update(_relative(path).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def find_cxx() -> str:
    """The C++ compiler: $CXX, else the system's."""
    if WINDOWS:
        if shutil.which('cl') is None:
            raise BuildError(
                'no C++ compiler: cl.exe is not on PATH (start from the "x64 Native Tools" prompt '
                'of the Visual Studio Build Tools)'
            )
        return 'cl'
    wanted = os.environ.get('CXX')
    for name in (wanted,) if wanted else ('c++', 'g++', 'clang++'):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(
        f'no C++ compiler ({wanted or "c++, g++, clang++"} not found): install one, for example '
        'with apt-get install g++'
    )


def cxx_version(cxx: str) -> str:
    """First line of the compiler's version."""
    if WINDOWS:
        return 'MSVC'
    result = subprocess.run([*shlex.split(cxx), '--version'], capture_output=True, text=True)
    return (result.stdout or result.stderr).partition('\n')[0].strip()


def cxx_standard() -> str:
    """The C++ standard that this torch's headers need, as torch's own extensions are compiled.

    torch states it nowhere but in the flags of ``torch.utils.cpp_extension``; importing that module
    would import setuptools and look for CUDA.
    """
    spec = importlib.util.find_spec('torch.utils.cpp_extension')
    text = Path(spec.origin).read_text(encoding='utf-8') if spec and spec.origin else ''
    found = Counter(re.findall(r'[-/]std[=:](c\+\+\d\d)\b', text))
    return found.most_common(1)[0][0] if found else 'c++17'


def find_cuda_home() -> tuple[Path, Path] | None:
    """nvcc and the toolkit it belongs to, or None.

    nvcc on PATH may be a link or a script far from its toolkit, so nvcc itself is queried.
    """
    candidates = []
    for variable in ('CUDA_HOME', 'CUDA_PATH'):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]))
    on_path = shutil.which('nvcc')
    if on_path:
        candidates.append(Path(on_path).resolve().parent.parent)
        asked = subprocess.run(
            [on_path, '--dryrun', '-c', '-x', 'cu', os.devnull, '-o', os.devnull],
            capture_output=True,
            text=True,
        )
        top = re.search(r'^#\$ (?:TOP|_HERE_)=(.+)$', asked.stderr + asked.stdout, re.MULTILINE)
        if top:
            here = Path(top.group(1).strip())
            candidates += [here, here.parent]
    candidates.append(Path('/usr/local/cuda'))
    for home in candidates:
        nvcc = home / 'bin' / ('nvcc.exe' if WINDOWS else 'nvcc')
        if nvcc.is_file() and (home / 'include' / 'cuda_runtime_api.h').is_file():
            return nvcc, home.resolve()
    return None


def find_cuda(wanted: bool | None = None) -> tuple[CudaConfig | None, str]:
    """Tools for compiling the CUDA kernels, or the reason not to.

    Args:
        wanted: True requires them, False omits them, None takes them if there are nvcc and a GPU,
            unless ``MMVIM_FORCE_CUDA`` decides: 1 requires, 0 omits them.

    Raises:
        BuildError: If they are required and cannot be compiled.
    """
    import torch

    if wanted is None:
        wanted = {'1': True, '0': False}.get(os.environ.get('MMVIM_FORCE_CUDA', ''))
    if wanted is False:
        return None, 'not requested'
    reason = None
    toolkit = find_cuda_home()
    if toolkit is None:
        reason = 'no nvcc (set CUDA_HOME, or put it on PATH)'
    elif torch.version.cuda is None:
        reason = f'torch {torch.__version__} is built without CUDA'
    elif wanted is None and not torch.cuda.is_available():
        reason = 'no GPU here (MMVIM_FORCE_CUDA=1 builds without one)'
    else:
        version = nvcc_version(toolkit[0])
        if version.split('.')[0] != torch.version.cuda.split('.')[0]:
            reason = f'nvcc is CUDA {version} and torch is built for CUDA {torch.version.cuda}'
    if reason is not None:
        if wanted:
            raise BuildError(f'CUDA kernels were requested, but: {reason}')
        return None, reason
    nvcc, home = toolkit
    return CudaConfig(nvcc, home, cuda_architectures(nvcc)), ''


def nvcc_version(nvcc: Path) -> str:
    """The version of nvcc, such as '13.0'."""
    text = subprocess.run([str(nvcc), '--version'], capture_output=True, text=True).stdout
    found = re.search(r'release (\d+\.\d+)', text)
    return found.group(1) if found else 'unknown'


def cuda_architectures(nvcc: Path) -> tuple[str, ...]:
    """From TORCH_CUDA_ARCH_LIST, else the GPUs of this machine, else all common ones.

    Raises:
        BuildError: For a name that is not an architecture, and for one that nvcc miscompiles.
    """
    import torch

    listed = os.environ.get('TORCH_CUDA_ARCH_LIST', '')
    if listed and listed != 'native':
        for name, value in _NAMED_ARCHITECTURES.items():
            listed = listed.replace(name, value)
        result = tuple(x for x in re.split(r'[;,\s]+', listed) if x)
        for value in result:
            if not re.fullmatch(r'\d+\.\d[af]?(\+PTX)?', value):
                raise BuildError(
                    f'TORCH_CUDA_ARCH_LIST must hold entries such as 9.0 or 8.6+PTX, got {value!r}'
                )
            good = _MISCOMPILED.get(re.match(r'\d+\.\d', value).group())
            if good and nvcc_version(nvcc).startswith(_MISCOMPILING_CUDA):
                raise BuildError(
                    f'TORCH_CUDA_ARCH_LIST: nvcc {nvcc_version(nvcc)} makes code for {value} that '
                    f'computes wrong convolutions; list {good}, which runs on the same GPUs'
                )
        return result
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        names = [f'{major}.{minor}' for major, minor in sorted(found)]
        if nvcc_version(nvcc).startswith(_MISCOMPILING_CUDA):
            names = [_MISCOMPILED.get(name, name) for name in names]
        return tuple(dict.fromkeys(names))
    text = subprocess.run([str(nvcc), '--list-gpu-arch'], capture_output=True, text=True).stdout
    known = set(re.findall(r'compute_(\d+)', text))
    result = [a for a in _DEFAULT_ARCHITECTURES if a.replace('.', '') in known]
    return (*result[:-1], f'{result[-1]}+PTX') if result else ('9.0+PTX',)


def _gencode(architectures: Sequence[str]) -> list[str]:
    flags = []
    for entry in architectures:
        number = entry.removesuffix('+PTX').replace('.', '')
        flags.append(f'-gencode=arch=compute_{number},code=sm_{number}')
        if entry.endswith('+PTX'):
            flags.append(f'-gencode=arch=compute_{number},code=compute_{number}')
    return flags


class _Compiler:
    """Command lines that turn a unit into an object, and objects into the library."""

    def __init__(self, cuda: CudaConfig | None):
        import torch

        self.cuda = cuda
        self.cxx = find_cxx()
        self.version = cxx_version(self.cxx)
        self.torch_root = Path(torch.__file__).resolve().parent
        self.standard = cxx_standard()
        self.abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)

    def compile(self, unit: Unit, out: Path) -> list[str]:
        source = str(ROOT / unit.source)
        if unit.kind == 'cuda':
            host = ['-Xcompiler', '/MD,/EHsc' if WINDOWS else '-fPIC,-fvisibility=hidden']
            flags = [*_NVCC_FLAGS, *_gencode(self.cuda.architectures), *host]
            return [str(self.cuda.nvcc), *flags, '-c', source, '-o', str(out)]
        defines, includes, flags = [], [], []
        if X86:
            defines.append('MMVIM_BUILD_X86')
        if unit.kind == 'kernel':
            defines.append(f'MMVIM_ISA={unit.isa}')
            flags += _ISA_FLAGS[unit.isa][1 if WINDOWS else 0]
        if unit.kind in ('glue', 'cuda-glue'):
            include = self.torch_root / 'include'
            includes += [include, include / 'torch' / 'csrc' / 'api' / 'include']
            if not WINDOWS and not MACOS:
                defines.append(f'_GLIBCXX_USE_CXX11_ABI={self.abi}')
            standard = self.standard
        else:
            standard = 'c++17'
        if unit.kind in ('cuda-glue', 'onnx-cuda'):
            includes.append(self.cuda.home / 'include')
        if unit.kind == 'onnx' and self.cuda is not None:
            defines.append('MMVIM_BUILD_CUDA')
        if unit.source == 'common/runtime.cpp' and not MACOS:
            # torch before 2.10: at::parallel_for is a template over OpenMP.
            flags.append('/openmp' if WINDOWS else '-fopenmp')
        if WINDOWS:
            flags = [*_MSVC_FLAGS, f'/std:{standard}', *flags]
            flags += [f'/D{d}' for d in defines] + [f'/I{i}' for i in includes]
            return [self.cxx, *flags, '/c', source, f'/Fo{out}']
        slow = unit.kind != 'kernel' or unit.source in _O2_KERNELS
        base = [('-O2' if slow and f == '-O3' else f) for f in _CXX_FLAGS]
        flags = [*base, f'-std={standard}', *flags, *(f'-D{d}' for d in defines)]
        for i in includes:
            flags += ['-isystem', str(i)]
        return [*shlex.split(self.cxx), *flags, '-c', source, '-o', str(out)]

    def link(self, objects: Sequence[Path], out: Path) -> list[str]:
        libraries, folders = [], []
        if out.name == LIBRARY_NAME:
            libraries = ['c10', 'torch_cpu', 'torch']
            folders = [self.torch_root / 'lib']
        if self.cuda is not None:
            # A session on a CPU needs no CUDA: its runtime is part of the library.
            runtime = ['cudart_static'] if WINDOWS else ['cudart_static', 'dl', 'rt', 'pthread']
            libraries += ['c10_cuda', 'torch_cuda', 'cudart'] if libraries else runtime
            lib = self.cuda.home / ('lib/x64' if WINDOWS else 'lib64')
            folders.append(lib if lib.is_dir() else self.cuda.home / 'lib')
        files = [str(o) for o in objects]
        if WINDOWS:
            tail = [f'/LIBPATH:{f}' for f in folders] + [f'{name}.lib' for name in libraries]
            return [self.cxx, '/nologo', '/LD', *files, f'/Fe{out}', '/link', *tail]
        if MACOS:
            # torch is loaded first, so its symbols are found.
            shared, tail = ['-dynamiclib', '-undefined', 'dynamic_lookup'], []
        else:
            shared = ['-shared', '-Wl,--as-needed', '-Wl,-s']
            tail = [f'-L{f}' for f in folders] + [f'-l{name}' for name in libraries]
        return [*shlex.split(self.cxx), *shared, *files, *tail, '-o', str(out)]


def _dependencies(source: Path, seen: set[Path] | None = None) -> set[Path]:
    """A source and the headers of this folder that it includes."""
    seen = set() if seen is None else seen
    if source in seen:
        return seen
    seen.add(source)
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.MULTILINE):
        header = (source.parent / name).resolve()
        if header.is_file():
            _dependencies(header, seen)
    return seen


def _object_name(unit: Unit, command: Sequence[str], compiler: str, out: Path) -> str:
    """A name from everything it depends on, so that an existing object is up to date.

    Not from where this folder lies: a copy of it finds the same objects.
    """
    digest = hashlib.sha256(compiler.encode())
    words = [str(c).replace(str(ROOT), '') for c in command if str(out) not in str(c)]
    digest.update('\0'.join(words).encode())
    for path in sorted(_dependencies(ROOT / unit.source)):
        digest.update(path.read_bytes())
    stem = re.sub(r'\W', '_', f'{unit.source}_{unit.isa}')
    return f'{stem}_{digest.hexdigest()[:16]}.{"obj" if WINDOWS else "o"}'


def _run(command: Sequence[str], what: str, scratch: Path | None = None) -> None:
    """Run a compiler, which puts its own temporary files into ``scratch``."""
    environment = dict(os.environ)
    if scratch is not None:
        environment |= dict.fromkeys(('TMP', 'TEMP', 'TMPDIR'), str(scratch))
    result = subprocess.run(
        command, capture_output=True, text=True, errors='replace', env=environment
    )
    if result.returncode != 0:
        lines = (result.stderr + result.stdout).strip().splitlines()
        errors = [line for line in lines if 'error' in line.lower()] or lines[-5:]
        raise BuildError(
            f'{what} does not compile:\n'
            + '\n'.join(errors[:8])
            + f'\ncommand: {shlex.join(command)}'
        )


def compile_units(
    compiler: _Compiler, wanted: Sequence[Unit], folder: Path, report: Report
) -> list[Path]:
    """Compile in parallel into ``folder``, where objects that are up to date are kept.

    Raises:
        BuildError: If a unit does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    placeholder = folder / 'object'
    objects, todo = [], []
    for unit in wanted:
        name = _object_name(
            unit, compiler.compile(unit, placeholder), compiler.version, placeholder
        )
        objects.append(folder / name)
        if not objects[-1].is_file():
            todo.append((unit, objects[-1]))
    if not todo:
        return objects
    done = 0

    def compile_one(unit: Unit, target: Path) -> None:
        nonlocal done
        start = time.monotonic()
        temporary = target.with_name(f'{os.getpid()}_{target.name}')
        try:
            _run(compiler.compile(unit, temporary), unit.label, folder)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        done += 1
        report(f'[{done}/{len(todo)}] {unit.label}: {time.monotonic() - start:.0f} s')

    with ThreadPoolExecutor(_jobs()) as pool:
        futures = [pool.submit(compile_one, *item) for item in todo]
        finished, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in finished:
            future.result()
    return objects


def _jobs() -> int:
    listed = os.environ.get('MAX_JOBS', '')
    if listed.isdigit() and int(listed) > 0:
        return int(listed)
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build(
    folder: Path,
    *,
    cuda: bool | None = None,
    report: Report = print,
    objects: Path | None = None,
) -> dict:
    """Build the libraries and their description into ``folder``.

    Args:
        folder: Receives ``_C.so`` (``.pyd`` on Windows), ``_onnx.so`` (``.dll``) and
            ``_build_info.json``.
        cuda: As for :func:`find_cuda`.
        report: Called with lines of progress.
        objects: Folder that keeps object files for the next build, and the compiler's temporary
            files; by default a temporary folder.

    Returns:
        The description.

    Raises:
        BuildError: With the reason, if it cannot be built.
    """
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f'there was no torch to compile against ({error}): pip builds in an environment of '
            'its own unless told --no-build-isolation'
        ) from error
    start = time.monotonic()
    config, no_cuda = find_cuda(cuda)
    compiler = _Compiler(config)
    wanted = units(config is not None)
    target = 'CPU' if config is None else f'CPU and CUDA {", ".join(config.architectures)}'
    note = f' (no CUDA: {no_cuda})' if no_cuda else ''
    report(
        f'mmvim: compiling {len(wanted)} files for {target}{note} with {compiler.version}, '
        f'{compiler.standard}, torch {torch.__version__}, {_jobs()} jobs'
    )
    folder.mkdir(parents=True, exist_ok=True)
    if objects is not None:
        objects.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='mmvim-', dir=objects) as scratch:
        built = compile_units(compiler, wanted, objects or Path(scratch), report)
        for name in (ONNX_NAME, LIBRARY_NAME):
            temporary = Path(scratch) / name
            parts = [out for unit, out in zip(wanted, built, strict=True) if name in unit.libraries]
            _run(compiler.link(parts, temporary), f'{name} (link)', Path(scratch))
            size = temporary.stat().st_size
            # A process may have mapped the old library: replace it, never write into it.
            staged = folder / f'{os.getpid()}_{name}'
            shutil.copyfile(temporary, staged)
            os.replace(staged, folder / name)
    seconds = time.monotonic() - start
    info = {
        'torch': torch.__version__,
        'sources': sources_hash(config is not None),
        'compiler': compiler.version,
        'cpu': list(isas()),
        'cuda': None if config is None else nvcc_version(config.nvcc),
        'architectures': [] if config is None else list(config.architectures),
        'no_cuda': no_cuda,
        'bytes': size,
        'seconds': round(seconds),
    }
    write_info(folder, info)
    report(f'mmvim: built {folder / LIBRARY_NAME} in {seconds:.0f} s')
    return info


def write_info(folder: Path, info: dict) -> None:
    """Write the description of a build, or ``{'error': reason}``."""
    staged = folder / f'{os.getpid()}_{INFO_NAME}'
    staged.write_text(json.dumps(info, indent=2) + '\n', encoding='utf-8')
    os.replace(staged, folder / INFO_NAME)


def check_cuda(architecture: str, folder: Path | None = None, report: Report = print) -> bool:
    """Compile every CUDA source, and the glue if torch is built for CUDA, without linking.

    Args:
        architecture: GPU architecture, such as ``9.0``.
        folder: Keeps objects, so that only changes are recompiled.
        report: Called with lines of progress.

    Returns:
        False if there is no nvcc and nothing was checked.

    Raises:
        BuildError: If a source does not compile.
    """
    toolkit = find_cuda_home()
    if toolkit is None:
        report(
            'no nvcc here (set CUDA_HOME, or put it on PATH): the CUDA sources were NOT compiled'
        )
        return False
    nvcc, home = toolkit
    config = CudaConfig(nvcc, home, (architecture,))
    wanted = [u for u in units(True) if u.kind in ('cuda', 'onnx-cuda')]
    import torch

    if torch.version.cuda is not None:
        wanted += [u for u in units(True) if u.kind == 'cuda-glue']
    else:
        report('torch is built without CUDA: the host glue is left out')
    with tempfile.TemporaryDirectory(prefix='mmvim-') as scratch:
        compile_units(_Compiler(config), wanted, folder or Path(scratch), report)
    report(f'{len(wanted)} CUDA sources compile for {architecture} with nvcc {nvcc_version(nvcc)}')
    return True


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--output', type=Path, default=ROOT.parent / 'mmvim', help='library folder')
    parser.add_argument('--objects', type=Path, help='folder that keeps objects for the next build')
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--cuda', action='store_true', default=None, help='demand the CUDA kernels')
    choice.add_argument('--no-cuda', dest='cuda', action='store_false', help='leave them out')
    parser.add_argument(
        '--check-cuda',
        nargs='?',
        const='9.0',
        metavar='ARCHITECTURE',
        help='only compile the CUDA sources, for 9.0 or sm_90, or for all common ones; without '
        'nvcc say so and succeed',
    )
    args = parser.parse_args()
    try:
        if args.check_cuda:
            one = re.sub(r'^sm_(\d+)(\d[af]?)$', r'\1.\2', args.check_cuda)
            for listed in _DEFAULT_ARCHITECTURES if one == 'all' else (one,):
                check_cuda(listed, args.objects)
        else:
            build(args.output, cuda=args.cuda, objects=args.objects)
    except BuildError as error:
        print(f'mmvim: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
