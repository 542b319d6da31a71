"""Wheel, source distribution and installation, with and without a compiler."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip('setuptools')

ENTRIES = (
    'configs',
    'csrc',
    'mmvim',
    'tools',
    'setup.py',
    'pyproject.toml',
    'MANIFEST.in',
    'README.md',
    'LICENSE',
    'model-index.yml',
)


@pytest.fixture
def checkout(root, tmp_path):
    """A clean copy of what packaging needs."""
    target = tmp_path / 'mmvim'
    ignore = shutil.ignore_patterns(
        '__pycache__', '_C.*', '_onnx.*', '_build_info.json', '.mim', '*.egg-info', '*.o'
    )
    for name in ENTRIES:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=ignore)
        elif (root / name).is_file():
            shutil.copyfile(root / name, target / name)
    return target


def run_setup(checkout, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, 'setup.py', '-q', *arguments],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def wheel_of(checkout):
    (path,) = (checkout / 'dist').glob('*.whl')
    return path


def test_wheel_without_kernels(checkout, root, tmp_path):
    run_setup(checkout, 'bdist_wheel', MMVIM_SKIP_BUILD='1')
    wheel = wheel_of(checkout)
    assert wheel.name.endswith('-py3-none-any.whl')
    site = tmp_path / 'site'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    names = {p.relative_to(site).as_posix() for p in site.rglob('*') if p.is_file()}
    assert not [n for n in names if '__pycache__' in n or n.endswith(('.so', '.o'))]
    for folder, inside in (('csrc', 'mmvim/csrc'), ('configs', 'mmvim/.mim/configs')):
        for path in (root / folder).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                assert f'{inside}/{path.relative_to(root / folder).as_posix()}' in names
    assert 'mmvim/.mim/tools/train.py' in names
    metadata = json.loads((site / 'mmvim' / '_build_info.json').read_text())
    assert 'MMVIM_SKIP_BUILD=1' in metadata['error']

    code = (
        'import mmvim.ops as o\n'
        'assert "MMVIM_SKIP_BUILD=1" in o.backend_info()["reason"], o.backend_info()\n'
        'builder = o.extension._builder()\n'
        'print(builder.ROOT, len(builder.units(True)) > 20)'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(site), 'MMVIM_CACHE_DIR': str(tmp_path / 'cache')},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(site / 'mmvim' / 'csrc'), 'True']


def test_source_distribution_is_complete(checkout, root):
    run_setup(checkout, 'sdist')
    (path,) = (checkout / 'dist').glob('*.tar.gz')
    with tarfile.open(path) as archive:
        names = {n.partition('/')[2] for n in archive.getnames()}
    for folder in ('csrc', 'configs', 'tools'):
        for file in (root / folder).rglob('*'):
            if file.is_file() and '__pycache__' not in file.parts:
                assert file.relative_to(root).as_posix() in names
    assert {'setup.py', 'MANIFEST.in', 'LICENSE', 'mmvim/ops/extension.py'} <= names


def test_failing_compiler_does_not_fail_the_installation(checkout):
    result = run_setup(checkout, 'build_ext', '--inplace', CXX='no-such-compiler')
    assert 'installs without compiled kernels' in result.stderr
    assert not (checkout / 'mmvim' / '_C.so').exists()
    info = json.loads((checkout / 'mmvim' / '_build_info.json').read_text())
    assert 'no-such-compiler' in info['error']


def test_failing_build_keeps_an_earlier_library(checkout):
    (checkout / 'mmvim' / '_C.so').write_text('earlier')
    (checkout / 'mmvim' / '_build_info.json').write_text('{"torch": "earlier"}')
    run_setup(checkout, 'build_ext', '--inplace', CXX='no-such-compiler')
    assert (checkout / 'mmvim' / '_C.so').read_text() == 'earlier'
    assert 'earlier' in (checkout / 'mmvim' / '_build_info.json').read_text()


def test_editable_installation_from_any_folder(checkout, tmp_path):
    """The package is found where the checkout itself looks like a package of its name, too."""
    run_setup(checkout, 'editable_wheel', MMVIM_SKIP_BUILD='1')
    site = tmp_path / 'site'
    with zipfile.ZipFile(wheel_of(checkout)) as archive:
        archive.extractall(site)
    code = f'import site; site.addsitedir({str(site)!r}); import mmvim; print(mmvim.__file__)'
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    for folder in (checkout.parent, checkout, elsewhere):
        (folder / 'script.py').write_text(code)
        for arguments in (['script.py'], ['-c', code]):
            # Without site-packages, in which mmvim may be installed as well.
            result = subprocess.run(
                [sys.executable, '-S', *arguments],
                cwd=folder,
                env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stderr
            assert result.stdout.strip() == str(checkout / 'mmvim' / '__init__.py')


@pytest.fixture
def with_objects(checkout, root):
    """The checkout, with what an earlier installation compiled."""
    objects = root / 'build' / 'objects'
    if objects.is_dir():
        (checkout / 'build').mkdir()
        (checkout / 'build' / 'objects').symlink_to(objects)
    return checkout


USE = """
import torch, mmvim.ops, mamba_ssm
info = mmvim.ops.backend_info()
x = torch.randn(2, 5, 16)
y = mamba_ssm.Mamba(16, bimamba_type='v2')(x)
y.sum().backward()
print(info['loaded'], tuple(y.shape), info['library'] or info['reason'])
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.name == 'nt', reason='a shell script')
def test_wheel_for_others(with_objects, tmp_path):
    """Built, then installed in a new environment without a compiler, and used there."""
    script = with_objects / 'tools' / 'build_wheel.sh'
    dist = tmp_path / 'dist'
    subprocess.run(
        ['bash', script, '--cpu', dist],
        check=True,
        capture_output=True,
        env={**os.environ, 'PYTHON': sys.executable},
    )
    (wheel,) = dist.glob('*.whl')
    version = torch.__version__.partition('+')[0]
    assert wheel.name.startswith(f'mmvim-0.1.0+torch{version}.cpu-py3-none-')
    assert not wheel.name.endswith('-any.whl')
    assert not list(with_objects.glob('*.egg-info'))

    environment = tmp_path / 'environment'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', environment], check=True)
    python = environment / 'bin' / 'python'
    (site,) = environment.glob('lib/python3*/site-packages')
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '-q', wheel]
    without = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    subprocess.run(pip, check=True, env=without)
    # torch of this environment, behind what is installed in the new one.
    behind = str(Path(torch.__file__).parents[1])
    (site / 'zz_torch.pth').write_text(f'import sys; sys.path.append({behind!r})')
    metadata = next(site.glob('mmvim-*.dist-info')) / 'METADATA'
    assert f'\nRequires-Dist: torch=={version}\n' in metadata.read_text()

    def use():
        result = subprocess.run(
            [python, '-c', USE],
            cwd=tmp_path,
            env={'PATH': '/nowhere', 'HOME': str(tmp_path), 'MMVIM_DROPIN': '1'},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert use().startswith(f'True (2, 5, 16) {site}/mmvim/_C.')
    info = site / 'mmvim' / '_build_info.json'
    info.write_text(info.read_text().replace(torch.__version__, '2.0.0+cu118'))
    assert use().startswith(
        'False (2, 5, 16) the kernels were compiled for torch 2.0.0+cu118 and this is '
        f'{torch.__version__}'
    )


def test_wheel_for_others_needs_kernels(checkout):
    result = subprocess.run(
        ['bash', checkout / 'tools' / 'build_wheel.sh', '--cpu'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHON': sys.executable, 'CXX': 'no-such-compiler'},
    )
    assert result.returncode != 0
    assert 'no C++ compiler (no-such-compiler' in result.stderr
    assert not list((checkout / 'dist').glob('*.whl'))
    usage = subprocess.run(
        ['bash', checkout / 'tools' / 'build_wheel.sh', '--gpu'], capture_output=True, text=True
    )
    assert usage.returncode == 2
    assert '--cpu   without CUDA kernels' in usage.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_wheel(with_objects, tmp_path):
    checkout = with_objects
    run_setup(checkout, 'bdist_wheel', MMVIM_FORCE_CUDA='0')
    wheel = wheel_of(checkout)
    tags = wheel.stem.split('-')[-3:]
    assert tags[:2] == ['py3', 'none']
    assert tags[2] != 'any'
    site = tmp_path / 'site'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    result = subprocess.run(
        [
            sys.executable,
            '-c',
            'import mmvim.ops as o; i = o.backend_info(); print(i["library"], i["cpu_kernels"])',
        ],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert 'bidirectional_scan' in result.stdout
