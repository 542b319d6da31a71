"""Commands and code of README and docs work.

Python blocks run. A block that needs data, a GPU or a network has a visible mark before it,
``<!-- not run: reason -->``, and is compiled only. Of shell blocks every command of this repository
is put through the script's own argument parser, so that no flag, choice or file name is made up.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from documents import PYTHON, ROOT, SHELL, blocks_of, commands, documents
from script_runner import run_script

MAKEFILE = (ROOT / 'Makefile').read_text()
TARGETS = set(re.findall(r'^([a-z][a-z-]*):', MAKEFILE, re.MULTILINE))
#: Names that stand for a file of the reader's in a command.
PLACEHOLDERS = {'CONFIG': 'configs/vim/vim-tiny_8xb128_in1k.py', 'N': '1', 'S': '1', 'GPUS': '2'}
#: Prefixes of paths that this repository must have.
OURS = ('configs/', 'tools/', 'tests/', 'csrc/', 'mmvim/', 'docs/')


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the repository's configs, where the block may write what it likes."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize('block', blocks_of(PYTHON), ids=lambda b: b.name)
def test_python(block, elsewhere, capsys):
    code = compile(block.text, block.name, 'exec')
    if block.skipped:
        pytest.skip(block.skipped)
    exec(code, {'__name__': 'block'})
    # `print(…)  # text` states what is printed.
    stated = [
        line.rpartition('# ')[2].strip()
        for line in block.text.splitlines()
        if line.startswith('print(') and ')  # ' in line and not line.startswith('print(report')
    ]
    printed = capsys.readouterr().out.splitlines()
    if stated and len(printed) == sum(line.startswith('print(') for line in block.text.split('\n')):
        assert set(stated) <= set(printed)


class Parsed(Exception):
    """The arguments were understood."""


def parse(words: list[str]) -> None:
    """Run a script up to the end of its argument parsing."""
    script = ROOT / words[0]
    assert script.is_file(), f'there is no {words[0]}'
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    errors = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, 'parse_args', parse_args),
        mock.patch.object(sys, 'argv', [str(script), *words[1:]]),
        mock.patch.object(sys, 'path', list(sys.path)),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(script), run_name='__main__')
        except Parsed:
            return
        except SystemExit:
            pytest.fail(f'{" ".join(words)}: {errors.getvalue().strip().splitlines()[-1]}')
    pytest.fail(f'{words[0]} read no arguments')


def check_paths(words: list[str]) -> None:
    for word in words:
        if word.startswith(OURS) and not re.search(r'[*…<>{}]', word):
            assert (ROOT / word).exists(), f'there is no {word}'


def check_command(line: str) -> None:
    line = (
        re.sub(r'\[[^\]]*\]', '', line) if line.startswith(('tools/dist', 'tools/slurm')) else line
    )
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
        words = words[1:]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if not words:
        return
    check_paths(words)
    program = words[0]
    if program in ('python', 'python3') and len(words) > 1 and words[1].startswith('tools/'):
        parse(words[1:])
    elif program in ('python', 'python3') and words[1:2] == ['-c']:
        compile(words[2], line, 'exec')
    elif program in ('bash', 'sh') and words[1].startswith('tools/'):
        assert (ROOT / words[1]).is_file()
    elif program == 'make':
        targets = [word for word in words[1:] if '=' not in word]
        assert set(targets) <= TARGETS, f'the Makefile has no target {set(targets) - TARGETS}'
        variables = {word.partition('=')[0] for word in words[1:] if '=' in word}
        known = set(
            re.findall(r'[A-Z_]{3,}', MAKEFILE + (ROOT / 'tools/setup_venv.sh').read_text())
        )
        assert variables <= known, f'unknown {variables - known}'


@pytest.mark.parametrize('block', blocks_of(SHELL), ids=lambda b: b.name)
def test_shell(block):
    if block.skipped:
        pytest.skip(block.skipped)
    for line in commands(block.text):
        check_command(line)


def test_a_made_up_flag_or_file_is_found():
    with pytest.raises(pytest.fail.Exception, match='unrecognized arguments: --fast'):
        check_command('python tools/train.py CONFIG --fast')
    with pytest.raises(pytest.fail.Exception, match='invalid choice'):
        check_command('python tools/train.py CONFIG --amp-dtype float8')
    with pytest.raises(AssertionError, match='there is no configs/vim/vim-huge'):
        check_command('python tools/train.py configs/vim/vim-huge_in1k.py')
    with pytest.raises(AssertionError, match='no target'):
        check_command('make quickstart-audio')


def links(path: Path) -> list[str]:
    text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
    return re.findall(r'\]\(([^)#\s]+)[^)]*\)', text)


@pytest.mark.parametrize('path', documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in links(path):
        assert '://' in link or (path.parent / link).exists(), link


def test_the_picture_of_the_claim_shows_the_measured_figures():
    result = run_script('misc/claim_picture.py', '--check')
    assert result.returncode == 0, result.stdout
