"""Finding, refusing and compiling the library, and what mmvim says about it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from csrc_support import load_module

from mmvim.ops import extension as real

USE = """
import torch
from mmvim import ops
u = torch.ones(1, 3, 2)
y = ops.selective_scan(u, u, -torch.ones(2, 2), torch.ones(1, 3, 2), torch.ones(1, 3, 2))
print(ops.extension.supports('selective_scan', 'cpu', torch.float32), float(y.sum()) > 0)
"""


def describe(extension, **changes):
    """Put a library that is not one, and its description, into the package."""
    builder = extension._builder()
    info = {'torch': torch.__version__, 'sources': builder.sources_hash(False), 'cuda': None}
    (extension._PACKAGE / builder.INFO_NAME).write_text(json.dumps({**info, **changes}))
    (extension._PACKAGE / builder.LIBRARY_NAME).write_text('not a library')


def run(package, code=USE, **environment):
    variables = {**os.environ, 'PYTHONPATH': str(package), 'OMP_NUM_THREADS': '1', **environment}
    return subprocess.run(
        [sys.executable, '-c', code], env=variables, cwd=package, capture_output=True, text=True
    )


def assert_not_loaded(extension, pattern):
    assert extension.load() is False
    assert extension.loaded() is False
    assert not extension.supports('selective_scan', 'cpu', torch.float32)
    assert re.search(pattern, extension.why_not())
    info = extension.backend_info()
    assert info['loaded'] is False
    assert info['library'] is None
    assert info['cpu_kernels'] == info['cuda_kernels'] == []
    assert info['reason'] == extension.why_not()
    assert 'mmvim.ops.build()' in info['reason']


def test_nothing_is_compiled(extension):
    assert_not_loaded(extension, 'have not been compiled')


def test_library_of_another_torch_is_refused(extension):
    describe(extension, torch='1.0.0')
    assert_not_loaded(
        extension, rf'compiled for torch 1\.0\.0 and this is {torch.__version__}'[:40]
    )


def test_library_of_other_sources_is_refused(extension):
    describe(extension, sources='0' * 64)
    assert_not_loaded(extension, 'sources in csrc have changed')


def test_broken_library_is_refused(extension):
    describe(extension)
    assert_not_loaded(extension, 'cannot be loaded')


def test_description_that_cannot_be_read(extension):
    describe(extension)
    (extension._PACKAGE / '_build_info.json').write_text('{"torch": ')
    assert_not_loaded(extension, 'have not been compiled')


def test_reason_of_a_failed_build_is_told(extension):
    (extension._PACKAGE / '_build_info.json').write_text('{"error": "no compiler that day"}')
    assert_not_loaded(extension, 'not compiled: no compiler that day')


def test_build_without_a_compiler(extension, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(RuntimeError, match=r'no C\+\+ compiler'):
        extension.build(verbose=False, cuda=False)
    assert_not_loaded(extension, 'have not been compiled')


def test_build_without_sources(extension):
    (extension._PACKAGE.parent / 'csrc').unlink()
    with pytest.raises(RuntimeError, match='csrc'):
        extension.build(verbose=False)


def test_jit_without_a_compiler_goes_on_in_pytorch(package, tmp_path):
    result = run(package, MMVIM_JIT='1', PATH='', CXX='', MMVIM_CACHE_DIR=str(tmp_path / 'c'))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ['False', 'True']
    assert 'goes on with PyTorch operators' in result.stderr
    assert 'C++ compiler' in result.stderr


def test_demanding_what_is_not_compiled_says_how_to_build(package, tmp_path):
    result = run(package, MMVIM_BACKEND='compiled', MMVIM_CACHE_DIR=str(tmp_path / 'c'))
    assert result.returncode != 0
    assert 'mmvim.ops.build()' in result.stderr.splitlines()[-1]


@pytest.mark.skipif(os.name == 'nt', reason='POSIX permissions')
def test_cache_that_others_can_write_is_not_used(extension, tmp_path):
    cache = tmp_path / 'cache'
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(PermissionError, match='chmod 700'):
        extension._cache_root()
    with pytest.raises(PermissionError):
        extension.build(verbose=False, cuda=False)
    assert extension._cached_folders() == []
    assert 'unusable' in extension.backend_info()['cache']


@pytest.mark.skipif(os.name == 'nt', reason='POSIX permissions')
def test_cache_is_private(extension, tmp_path):
    assert extension._cache_root() == tmp_path / 'cache'
    assert (tmp_path / 'cache').stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name == 'nt', reason='fcntl')
def test_second_process_waits_for_the_lock(extension, tmp_path):
    path, released, lines = tmp_path / 'lock', tmp_path / 'released', []
    code = (
        'import fcntl, pathlib, sys, time\n'
        f'file = open({str(path)!r}, "a+b")\n'
        'fcntl.flock(file, fcntl.LOCK_EX)\n'
        'print("held", flush=True)\n'
        'sys.stdin.readline()\n'
        'time.sleep(0.2)\n'
        f'pathlib.Path({str(released)!r}).touch()\n'
    )
    with subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()

        def say(line):
            lines.append(line)
            holder.stdin.write('go on\n')
            holder.stdin.flush()

        with extension._file_lock(path, say):
            assert released.exists()
    assert lines == ['mmvim: waiting for another process that compiles the kernels']
    with extension._file_lock(path, lines.append):
        assert len(lines) == 1


# Compiles nothing: "builds" the library that this process uses, and dies where it is told to.
BUILD = """
import os, shutil, signal, sys, time
from pathlib import Path
from mmvim.ops import extension

whole, log, dies = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
builder = extension._builder()
replace = os.replace
moved = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def build(folder, *, cuda, report, objects):
    with open(log, 'a') as file:
        file.write('building\\n')
    objects.mkdir()
    content = (whole / builder.LIBRARY_NAME).read_bytes()
    with open(folder / builder.LIBRARY_NAME, 'wb') as file:
        file.write(content[: len(content) // 2])
        file.flush()
        if dies == 'half a library':
            die()
        time.sleep(0.5)
        file.write(content[len(content) // 2 :])
    (folder / builder.ONNX_NAME).write_text('not loaded here')
    if dies == 'no description':
        die()
    shutil.copyfile(whole / builder.INFO_NAME, folder / builder.INFO_NAME)

def counted(source, target):
    replace(source, target)
    moved.append(target)
    if dies == f'{len(moved)} moved':
        die()

builder.build = build
os.replace = counted
print('before', extension.load(), flush=True)
library = extension.build(verbose=False, cuda=False)
print('after', library.stat().st_size == (whole / builder.LIBRARY_NAME).stat().st_size)
print('kernels', extension.supports('selective_scan', 'cpu', extension.torch.float32))
"""
needs_library = pytest.mark.skipif(
    not real.loaded() or os.name == 'nt', reason='needs a compiled library, and signals'
)


@pytest.fixture
def fake_build(package, tmp_path):
    """Starts BUILD in a process; the library and its description lie in a cache of the test."""
    log = tmp_path / 'log'
    environment = {**os.environ, 'PYTHONPATH': str(package), 'OMP_NUM_THREADS': '1'}
    environment |= {'MMVIM_CACHE_DIR': str(tmp_path / 'cache'), 'MMVIM_JIT': '0'}
    whole = tmp_path / 'whole'
    whole.mkdir()
    shutil.copyfile(real._library, whole / real._library_name())
    builder = load_module('mmvim_build_of_whole', package / 'csrc/build.py')
    info = dict(real._info, sources=builder.sources_hash(False), cuda=None)
    info['bytes'] = real._library.stat().st_size
    (whole / '_build_info.json').write_text(json.dumps(info))

    def start(dies='never'):
        return subprocess.Popen(
            [sys.executable, '-c', BUILD, str(whole), str(log), dies],
            env=environment, cwd=package, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    start.log, start.cache = log, tmp_path / 'cache'
    yield start
    del sys.modules['mmvim_build_of_whole']


WHOLE = ['before', 'False', 'after', 'True', 'kernels', 'True']


@needs_library
@pytest.mark.parametrize(
    ('dies', 'builds'),
    [
        ('half a library', 2),
        pytest.param('no description', 2, marks=pytest.mark.slow),
        ('2 moved', 2),
        pytest.param('3 moved', 1, marks=pytest.mark.slow),
    ],
)
def test_a_build_that_is_killed_leaves_nothing_that_is_loaded(fake_build, dies, builds):
    with fake_build(dies) as killed:
        out, err = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, err
    assert out.split() == ['before', 'False']
    with fake_build() as second:
        out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    # Where all had been moved, the build was complete.
    assert out.split() == (WHOLE if builds == 2 else ['before', 'True', *WHOLE[2:]])
    assert len(fake_build.log.read_text().splitlines()) == builds
    left = [p for p in fake_build.cache.rglob('*') if p.name.startswith('building.')]
    assert len(left) == (0 if builds == 2 else 1)


@needs_library
def test_a_library_that_a_crash_has_cut_is_built_anew(fake_build):
    with fake_build() as first:
        out, err = first.communicate(timeout=120)
    assert out.split() == WHOLE, err
    (library,) = fake_build.cache.rglob(real._library_name())
    os.truncate(library, library.stat().st_size // 2)
    with fake_build() as second:
        out, err = second.communicate(timeout=120)
    assert out.split() == WHOLE, err
    assert len(fake_build.log.read_text().splitlines()) == 2


@needs_library
def test_two_processes_at_once_get_one_whole_library(fake_build):
    with fake_build() as first, fake_build() as second:
        results = [(*process.communicate(timeout=120), process) for process in (first, second)]
    for out, err, process in results:
        assert process.returncode == 0, err
        assert out.split()[2:] == WHOLE[2:]
    assert len(fake_build.log.read_text().splitlines()) == 1
    assert len(list(fake_build.cache.rglob(real._library_name()))) == 1


def test_a_library_of_another_size_than_was_built_is_refused(extension):
    describe(extension, bytes=5)
    assert_not_loaded(extension, 'has 13 bytes, not 5: it is damaged')


@pytest.mark.parametrize(
    ('entry', 'capability', 'covered'),
    [
        ('9.0', (9, 0), True),
        ('9.0', (10, 0), False),
        ('9.0+PTX', (10, 0), True),
        ('8.0', (8, 6), True),
        ('8.6', (8, 0), False),
        ('8.6+PTX', (8, 0), False),
        ('9.0a', (9, 0), True),
        ('12.0+PTX', (9, 0), False),
    ],
)
def test_which_gpus_a_library_serves(entry, capability, covered):
    assert real._covers(entry, *capability) is covered


def test_gpu_without_code_is_not_served(extension, monkeypatch):
    extension._info = {'architectures': ['9.0']}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda i: (8, 0))
    for op in ('selective_scan', 'causal_conv1d'):
        extension._supported[op, 'cuda'] = extension._DTYPES['cuda']
    assert not extension.supports('selective_scan', 'cuda', torch.float32)
    assert 'compiled for 9.0, but GPU 0 is 8.0' in extension._info['no_cuda']
    assert extension.backend_info()['cuda_kernels'] == []


def test_kernels_are_found_without_asking_a_gpu(extension, monkeypatch):
    """Asking would start CUDA, which forked processes could then not use."""
    asked = []

    def capability(i):
        asked.append(i)
        return 9, 0

    extension._info = {'architectures': ['9.0']}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', capability)
    registered = 'torch._C._dispatch_get_registrations_for_dispatch_key'
    monkeypatch.setattr(registered, lambda key: ['mmvim::selective_scan', 'aten::add.Tensor'])
    extension._find_kernels()
    assert set(extension._supported) == {('selective_scan', 'cpu'), ('selective_scan', 'cuda')}
    assert not extension.supports('selective_scan', 'cpu', torch.int64)
    assert asked == []
    for _ in range(2):
        assert extension.supports('selective_scan', 'cuda', torch.float32)
        assert asked == [0, 1]


def test_information_in_words():
    text = str(real.backend_info())
    lines = dict(line.split(':', 1) for line in text.splitlines())
    assert lines['torch'].strip() == torch.__version__
    assert lines['loaded'].strip() == ('yes' if real.loaded() else 'no')


@pytest.mark.skipif(not real.loaded(), reason='no compiled library')
def test_what_is_loaded():
    info = real.backend_info()
    assert info['reason'] is None
    assert info['cpu_instruction_set'] in ('portable', 'avx2', 'avx512')
    # The namespace of the PyTorch implementations holds all that has one.
    defined = {
        name.removeprefix('mmvim_torch::')
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith('mmvim_torch::')
    }
    defined |= {
        'mixer',
        'mixer_backward',
        'branch',
        'ss2d_blocks',
        'cross_scan_fused',
        'cross_scan_fused_backward',
    }
    # It runs on the fused op, or on the kernels of the selective scan.
    defined -= {'cross_scan', 'cross_scan_backward'}
    registered = torch._C._dispatch_get_registrations_for_dispatch_key('CPU')
    assert {name.removeprefix('mmvim::') for name in registered if 'mmvim::' in name} == defined
    assert set(info['cpu_kernels']) == {op for op in defined if not op.endswith('_backward')}
    for op in info['cpu_kernels']:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            assert real.supports(op, 'cpu', dtype)
        assert not real.supports(op, 'cpu', torch.int64)
        assert not real.supports(op, 'mps', torch.float32)
        assert not real.supports(op, 'cuda', torch.float64)
    assert not real.supports('no_such_op', 'cpu', torch.float32)
    assert real.build(verbose=False, cuda=False) == real._library


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiling_at_first_use_once_for_all_processes(package, tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(package), 'MMVIM_JIT': '1'}
    environment |= {'MMVIM_CACHE_DIR': str(tmp_path / 'cache'), 'OMP_NUM_THREADS': '1'}
    # Only the cache is written, also by the compiler, and what was killed does no harm.
    environment['TMPDIR'] = str(tmp_path / 'tmp')
    (tmp_path / 'tmp').mkdir()
    with subprocess.Popen(
        [sys.executable, '-c', USE], env=environment, cwd=package, stderr=subprocess.PIPE, text=True
    ) as killed:
        for line in killed.stderr:
            if line.startswith('[1/'):
                killed.kill()
                break
    assert not list((tmp_path / 'tmp').iterdir())
    assert list((tmp_path / 'cache').rglob('building.*'))
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', USE],
            env=environment,
            cwd=package,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [(*rank.communicate(timeout=3000), rank.returncode) for rank in ranks]
    for out, err, code in results:
        assert code == 0, err
        assert out.split() == ['True', 'True']
    compiled = ['mmvim: compiling' in err for _, err, _ in results]
    assert sorted(compiled) == [False, True]
    waited = results[compiled.index(False)][1]
    assert 'waiting for another process' in waited or waited == ''
    assert any('selective_scan/cpu_tile.cpp' in err for _, err, _ in results)

    later = run(package, MMVIM_CACHE_DIR=str(tmp_path / 'cache'), MMVIM_JIT='0')
    assert later.returncode == 0, later.stderr
    assert later.stdout.split() == ['True', 'True']
    assert 'compiling' not in later.stderr
    assert not [p for p in (tmp_path / 'cache').rglob('*') if p.stat().st_mode & 0o022]
    assert not list((tmp_path / 'cache').rglob('building.*'))
    assert not list((tmp_path / 'tmp').iterdir())
