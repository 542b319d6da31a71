"""csrc/build.py: what it finds, compiles and refuses, without compiling the library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from csrc_support import load_module

needs_compiler = pytest.mark.skipif(
    not any(os.access(Path(p) / 'c++', os.X_OK) for p in os.environ['PATH'].split(os.pathsep) if p),
    reason='needs a C++ compiler',
)


def test_every_source_is_compiled_once_for_each_target(builder):
    units = builder.units(cuda=True)
    assert len({(u.source, u.isa) for u in units}) == len(units)
    compiled = {u.source for u in units}
    present = {p.relative_to(builder.ROOT).as_posix() for p in builder.ROOT.rglob('*.c*')}
    assert compiled == {p for p in present if p.endswith(('.cpp', '.cu'))}
    kernels = [u for u in units if u.kind == 'kernel']
    assert {u.isa for u in kernels} == set(builder.isas())
    assert 'portable' in builder.isas()


def test_without_cuda_no_cuda_source(builder):
    assert not [u for u in builder.units(cuda=False) if 'cuda' in u.source or 'cuda' in u.kind]


def test_cuda_sources_include_no_torch_header(builder):
    for unit in builder.units(cuda=True):
        if unit.kind != 'cuda':
            continue
        for path in builder._dependencies(builder.ROOT / unit.source):
            text = path.read_text()
            assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', text), path


def test_kernels_define_nothing_outside_their_instruction_set(builder):
    # Code compiled for AVX-512 under a name that the portable kernels share could be linked into
    # them. Namespaces keep them apart as long as no standard container or algorithm appears.
    allowed = {'cmath', 'cstdint', 'cstring', 'cstddef', 'initializer_list', 'type_traits'}
    for unit in builder.units(cuda=False):
        if unit.kind != 'kernel':
            continue
        for path in builder._dependencies(builder.ROOT / unit.source):
            headers = set(re.findall(r'#\s*include\s*<([^>]+)>', path.read_text()))
            assert headers <= allowed | {'immintrin.h', 'xmmintrin.h'}, path


def test_hash_follows_the_sources_that_are_compiled(csrc):
    copy = load_module('mmvim_build_copy', csrc / 'build.py')
    cpu, everything = copy.sources_hash(False), copy.sources_hash(True)
    assert cpu == copy.sources_hash(False) != everything
    source = csrc / next(u.source for u in copy.units(cuda=True) if u.kind == 'cuda')
    source.write_text(source.read_text() + '\n')
    assert copy.sources_hash(False) == cpu
    assert copy.sources_hash(True) != everything
    header = csrc / 'common' / 'simd.h'
    header.write_text(header.read_text() + '\n')
    assert copy.sources_hash(False) != cpu
    del sys.modules['mmvim_build_copy']


def test_objects_follow_headers_and_flags(csrc):
    copy = load_module('mmvim_build_copy', csrc / 'build.py')
    unit = copy.Unit('selective_scan/cpu_tile.cpp', 'portable')
    other = copy.Unit('common/isa.cpp')
    out = Path('object')

    def name(u, *flags):
        return copy._object_name(u, ['c++', *flags, '-o', str(out)], 'c++ 1.0', out)

    first, untouched = name(unit), name(other)
    assert first == name(unit) != name(unit, '-O1')
    header = csrc / 'common' / 'discretization.h'
    header.write_text(header.read_text() + '\n')
    assert name(unit) != first
    assert name(other) == untouched
    del sys.modules['mmvim_build_copy']


def test_standard_is_that_of_torch(builder):
    from torch.utils import cpp_extension

    standard = builder.cxx_standard()
    assert standard in ('c++17', 'c++20', 'c++23')
    assert f'std={standard}' in Path(cpp_extension.__file__).read_text()


def test_no_compiler_is_an_error_that_says_so(builder, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(builder.BuildError, match=r'no C\+\+ compiler .*install one'):
        builder.find_cxx()
    monkeypatch.setenv('CXX', 'no-such-compiler -m64')
    with pytest.raises(builder.BuildError, match='no-such-compiler'):
        builder.find_cxx()


@needs_compiler
def test_compiler_errors_are_shown(builder, tmp_path):
    bad = tmp_path / 'bad.cpp'
    bad.write_text('int f() { return undeclared_name; }\n')
    with pytest.raises(builder.BuildError, match=r'(?s)bad does not compile.*undeclared_name.*-c'):
        builder._run([builder.find_cxx(), '-c', str(bad), '-o', str(tmp_path / 'o')], 'bad')


@needs_compiler
def test_one_failing_file_stops_the_build(csrc, tmp_path):
    copy = load_module('mmvim_build_copy', csrc / 'build.py')
    (csrc / 'common' / 'isa.cpp').write_text('#error stop here\n')
    with pytest.raises(copy.BuildError, match=r'(?s)common/isa.cpp does not compile.*stop here'):
        copy.compile_units(
            copy._Compiler(None), [copy.Unit('common/isa.cpp')], tmp_path / 'o', print
        )
    assert list((tmp_path / 'o').iterdir()) == []
    del sys.modules['mmvim_build_copy']


@needs_compiler
def test_objects_are_kept_and_used_again(builder, tmp_path):
    lines = []
    unit = builder.Unit('common/isa.cpp')
    compiler = builder._Compiler(None)
    first = builder.compile_units(compiler, [unit], tmp_path, lines.append)
    assert first[0].is_file()
    assert len(lines) == 1
    assert '[1/1] common/isa.cpp' in lines[0]
    assert builder.compile_units(compiler, [unit], tmp_path, lines.append) == first
    assert len(lines) == 1


@pytest.mark.parametrize(
    ('listed', 'expected'),
    [
        ('9.0', ('9.0',)),
        ('8.0;8.6+PTX', ('8.0', '8.6+PTX')),
        ('7.5 9.0a', ('7.5', '9.0a')),
        ('Hopper', ('9.0+PTX',)),
    ],
)
def test_architectures_from_the_environment(builder, monkeypatch, listed, expected):
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', listed)
    assert builder.cuda_architectures(Path('nvcc')) == expected


def test_unknown_architecture_is_refused(builder, monkeypatch):
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '9.0;fast')
    with pytest.raises(builder.BuildError, match=r"TORCH_CUDA_ARCH_LIST.*'fast'"):
        builder.cuda_architectures(Path('nvcc'))


@pytest.mark.skipif(os.name == 'nt', reason='shell scripts')
def test_architectures_that_nvcc_miscompiles(builder, tmp_path, monkeypatch):
    """sm_103, by nvcc 13: sm_100 instead, which runs there."""
    nvcc = fake_toolkit(tmp_path / 'cuda')
    for listed in ('9.0;10.3', '10.3a', '10.3+PTX'):
        monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', listed)
        with pytest.raises(
            builder.BuildError,
            match=r'nvcc 13\.0 makes code for 10\.3\S* .* wrong convolutions; list 10\.0',
        ):
            builder.cuda_architectures(nvcc)
        monkeypatch.setattr(builder, 'nvcc_version', lambda nvcc: '14.0')
        assert builder.cuda_architectures(nvcc)
        monkeypatch.undo()
    monkeypatch.delenv('TORCH_CUDA_ARCH_LIST', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    gpus = [(10, 3), (9, 0), (10, 0)]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', gpus.__getitem__)
    assert builder.cuda_architectures(nvcc) == ('9.0', '10.0')
    assert not any('103' in flag for flag in builder._gencode(builder._DEFAULT_ARCHITECTURES))


def test_gencode(builder):
    assert builder._gencode(['8.6', '12.0+PTX']) == [
        '-gencode=arch=compute_86,code=sm_86',
        '-gencode=arch=compute_120,code=sm_120',
        '-gencode=arch=compute_120,code=compute_120',
    ]


def fake_toolkit(folder):
    (folder / 'bin').mkdir(parents=True)
    (folder / 'include').mkdir()
    (folder / 'include' / 'cuda_runtime_api.h').touch()
    nvcc = folder / 'bin' / 'nvcc'
    nvcc.write_text(
        '#!/bin/sh\n'
        f'[ "$1" = --dryrun ] && echo "#\\$ _HERE_={folder}/bin" >&2\n'
        '[ "$1" = --version ] && echo "release 13.0, V13.0.88"\n'
        '[ "$1" = --list-gpu-arch ] && echo compute_75 compute_90\n'
        'exit 0\n'
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.skipif(os.name == 'nt', reason='shell scripts')
def test_toolkit_behind_a_script_on_path_is_found(builder, tmp_path, monkeypatch):
    toolkit = tmp_path / 'cuda-13.0'
    nvcc = fake_toolkit(toolkit)
    scripts = tmp_path / 'bin'
    scripts.mkdir()
    script = scripts / 'nvcc'
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', str(scripts))
    for variable in ('CUDA_HOME', 'CUDA_PATH', 'TORCH_CUDA_ARCH_LIST'):
        monkeypatch.delenv(variable, raising=False)
    assert builder.find_cuda_home() == (nvcc, toolkit.resolve())
    assert builder.nvcc_version(nvcc) == '13.0'
    if not torch.cuda.is_available():
        assert builder.cuda_architectures(nvcc) == ('7.5', '9.0+PTX')


@pytest.mark.skipif(torch.cuda.is_available(), reason='without a GPU')
def test_cuda_is_left_out_with_a_reason(builder, tmp_path, monkeypatch):
    monkeypatch.delenv('MMVIM_FORCE_CUDA', raising=False)
    toolkit = (fake_toolkit(tmp_path / 'cuda'), tmp_path / 'cuda')
    monkeypatch.setattr(builder, 'find_cuda_home', lambda: toolkit)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    config, reason = builder.find_cuda()
    assert config is None
    assert 'no GPU' in reason
    assert 'MMVIM_FORCE_CUDA=1' in reason
    assert builder.find_cuda(False) == (None, 'not requested')
    monkeypatch.setenv('MMVIM_FORCE_CUDA', '1')
    config, _ = builder.find_cuda()
    assert config.nvcc == toolkit[0]
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    with pytest.raises(builder.BuildError, match=r'CUDA 13\.0 and torch is built for CUDA 12\.8'):
        builder.find_cuda()
    monkeypatch.setattr(torch.version, 'cuda', None)
    with pytest.raises(builder.BuildError, match='built without CUDA'):
        builder.find_cuda(True)
    monkeypatch.setattr(builder, 'find_cuda_home', lambda: None)
    monkeypatch.setenv('MMVIM_FORCE_CUDA', '0')
    assert builder.find_cuda() == (None, 'not requested')
    monkeypatch.delenv('MMVIM_FORCE_CUDA')
    assert 'no nvcc' in builder.find_cuda()[1]


def test_cuda_check_without_nvcc_says_so_and_succeeds(builder, monkeypatch, capsys):
    monkeypatch.setattr(builder, 'find_cuda_home', lambda: None)
    monkeypatch.setattr(sys, 'argv', ['build.py', '--check-cuda'])
    assert builder.main() == 0
    assert 'NOT compiled' in capsys.readouterr().out


def test_command_line_reports_errors(root, tmp_path):
    environment = {**os.environ, 'CXX': 'no-such-compiler'}
    result = subprocess.run(
        [sys.executable, str(root / 'csrc' / 'build.py'), '--no-cuda', '--output', str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert 'no-such-compiler' in result.stderr
    assert 'Traceback' not in result.stderr
    assert list(tmp_path.iterdir()) == []
