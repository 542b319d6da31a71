"""Processes that find the large packages imported, but not mmvim: forks of one server."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([
    'pytest', 'torch._dynamo', 'torchvision', 'mmengine.runner', 'mmengine.registry',
    'scipy.optimize', 'sklearn.gaussian_process', 'pycocotools.mask', 'matplotlib.pyplot',
])  # fmt: skip


def call(function: Callable, *args: object, cwd: Path, env: dict | None = None, terminal=None):
    """Call a function of a module in a new process; its ``stdout`` and ``stderr`` come back.

    Args:
        function: Of a module that does not import mmvim.
        cwd: Its working directory.
        env: Its environment, this process's by default.
        terminal: Path of a terminal to write to, whose output does not come back.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = [terminal or f'{folder}/{name}' for name in ('out', 'err')]
        process = SERVER.Process(
            target=_redirected, args=(function, args, str(cwd), env or dict(os.environ), out, err)
        )
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        texts = ('', '') if terminal else (Path(out).read_text(), Path(err).read_text())
        return CompletedProcess(args, process.exitcode, *texts)


def run_script(script: Path, *args: object, **options) -> CompletedProcess:
    """Run ``python script args``; options are those of :func:`call`."""
    return call(_run, str(script), *map(str, args), **options)


def run_code(code: str, **options) -> CompletedProcess:
    """Run ``python -c code``; options are those of :func:`call`."""
    return call(exec, code, {'__name__': '__main__'}, **options)


def _redirected(function, args, cwd, env, out, err):
    for number, (name, path) in enumerate((('stdout', out), ('stderr', err)), start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        setattr(sys, name, open(number, 'w', buffering=1, closefd=False))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    function(*args)


def _run(script, *args):
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name='__main__')
