"""Every script under tools/ answers --help: what it imports is there, and its help can be read."""

import subprocess
import sys

import pytest
from script_runner import TOOLS, run_script

SCRIPTS = [
    str(path.relative_to(TOOLS))
    for path in sorted(TOOLS.rglob('*.py'))
    if '__name__ ==' in path.read_text(encoding='utf-8')
]
# It imports the package that the drop-in stands for.
PROGRAM = 'benchmark/dropin_program.py'


@pytest.mark.parametrize('script', [name for name in SCRIPTS if name != PROGRAM])
def test_help(script):
    done = run_script(script, '--help')
    assert done.returncode == 0
    assert done.stdout.startswith('usage: ')
    assert not done.stderr


def test_help_through_the_drop_in():
    assert PROGRAM in SCRIPTS
    command = [sys.executable, '-m', 'mmvim.dropin', str(TOOLS / PROGRAM), '--help']
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout[:6]) == (0, 'usage:'), done.stderr


@pytest.mark.parametrize('script', sorted(TOOLS.rglob('*.sh')), ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
    subprocess.run(['bash', '-n', str(script)], check=True, timeout=100)
