"""The Makefile and the set-up script, without installing anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which('make') is None, reason='needs make')

TARGETS = (
    'setup',
    'quickstart',
    'quickstart-mambavision',
    'quickstart-det',
    'quickstart-seg',
    'quickstart-video',
    'test',
    'test-slow',
    'lint',
    'format',
    'docs',
    'cuda-compile',
    'clean',
)


def make(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith('MAKE')}
    return subprocess.run(
        ['make', *arguments],
        cwd=repository,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def set_up(repository: Path, step: str, venv: Path, **environment: str):
    return subprocess.run(
        ['sh', 'tools/setup_venv.sh', step, str(venv)],
        cwd=repository,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def venv(tmp_path) -> Path:
    """An environment whose python logs its arguments, has pip and lacks torch."""
    script(
        tmp_path / 'venv' / 'bin' / 'python',
        f'echo "$@" >> {tmp_path}/log\n'
        'case "$*" in *"import torch"*) exit 1 ;; esac\n'
        'case "$*" in *" install "*) seq -f "pip says %g" 500; echo "pip fails" >&2; '
        'exit ${PIP_EXIT:-0} ;; esac\n'
        'exit 0',
    )
    return tmp_path / 'venv'


def test_help_is_the_default_and_lists_the_targets(repository):
    done = make(repository)
    assert done.returncode == 0
    assert done.stdout == make(repository, 'help').stdout
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith('  ')]
    assert set(TARGETS) <= set(listed)


@pytest.mark.parametrize('target', TARGETS)
def test_targets_can_be_planned(repository, tmp_path, target):
    done = make(repository, '-n', target, f'VENV={tmp_path}/venv')
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / 'venv').exists()


def test_quickstarts_pass_their_folders_on(repository, tmp_path):
    arguments = (f'VENV={tmp_path}/v', 'DATA_DIR=/d', 'WORK_DIR=/w')
    plan = make(repository, '-n', 'quickstart-det', *arguments).stdout
    assert 'tools/quickstart/run.py det --work-dir /w --data-dir /d' in plan


def test_an_old_python_is_refused(repository, tmp_path):
    old = script(tmp_path / 'old', 'case "$2" in *exit*) exit 1 ;; esac; echo 3.9')
    done = set_up(repository, 'install', tmp_path / 'venv', PYTHON=str(old))
    assert done.returncode == 1
    assert 'is Python 3.9 and mmvim needs 3.10' in done.stderr
    assert 'make PYTHON=' in done.stderr


def test_a_missing_python_is_named(repository, tmp_path):
    done = set_up(repository, 'install', tmp_path / 'venv', PYTHON='python-not-here')
    assert done.returncode == 1
    assert "no Python found as 'python-not-here'" in done.stderr


def test_too_little_disk(repository, venv):
    done = set_up(repository, 'install', venv, NEEDED_MIB='999999999')
    assert done.returncode == 1
    assert 'MiB free' in done.stderr
    assert 'VENV=' in done.stderr


def test_a_failing_pip_says_what_to_do(repository, venv):
    done = set_up(repository, 'install', venv, NEEDED_MIB='1', PIP_EXIT='1')
    assert done.returncode == 1
    assert 'no network or a proxy' in done.stderr
    assert 'PIP_ARGS' in done.stderr
    assert f'all of it in {venv}/pip.log' in done.stderr
    assert 'pip says 500\npip fails\n' in done.stderr
    assert 'pip says 1\n' not in done.stderr
    assert 'pip says 1\n' in (venv / 'pip.log').read_text()


@pytest.mark.parametrize('step', ['install', 'build'])
def test_a_pip_that_succeeds_is_quiet(repository, venv, step):
    done = set_up(repository, step, venv, NEEDED_MIB='1')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert all(line.startswith('==> ') for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) <= 4
    log = (venv / 'pip.log').read_text()
    assert log.count('pip fails') == log.count('==> ') == done.stdout.count('installing')


def test_every_installation_begins_its_log_anew(repository, venv):
    for step in ('install', 'build', 'install'):
        set_up(repository, step, venv, NEEDED_MIB='1')
    assert (venv / 'pip.log').read_text().count('==> ') == 3


def test_install_takes_torch_first_and_the_rest_with_build_isolation(repository, venv):
    done = set_up(
        repository,
        'install',
        venv,
        NEEDED_MIB='1',
        TORCH_SPEC='torch==2.9.0 torchvision',
        PIP_ARGS='--find-links /wheels',
        EXTRAS='onedl',
    )
    assert done.returncode == 0, done.stderr
    log = (venv.parent / 'log').read_text().splitlines()
    installs = [line for line in log if ' install ' in line]
    assert all('install --find-links /wheels' in line for line in installs)
    assert installs[1].endswith('torch==2.9.0 torchvision')
    assert installs[2].endswith('-e .[onedl]')
    assert '--no-build-isolation' not in installs[2]


def test_without_a_compiler_the_installation_goes_on(repository, venv):
    done = set_up(repository, 'build', venv, CXX='no-such-compiler')
    assert done.returncode == 0
    assert 'going on with the PyTorch operators' in done.stdout
    assert '--no-build-isolation --no-deps' in (venv.parent / 'log').read_text()


def test_an_unknown_step(repository, tmp_path):
    done = set_up(repository, 'frobnicate', tmp_path)
    assert done.returncode == 1
    assert "unknown step 'frobnicate'" in done.stderr
