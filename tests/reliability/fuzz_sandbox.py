"""A child process for cases that may crash the interpreter, hang or eat the memory.

``python fuzz_sandbox.py MODULE FD`` is the child: it imports MODULE and calls its ``run`` with each
case that comes through the pipe FD.
"""

import contextlib
import faulthandler
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
START_SECONDS = 300


class Outcome(NamedTuple):
    """What became of a case.

    ``kind`` is 'ok' (a right result), 'refused' (a clear error), 'failed' (anything else that left
    the process alive), 'crashed' (the process ended) or 'hung' (it did not answer in time).
    """

    kind: str
    detail: str

    @property
    def good(self) -> bool:
        return self.kind in ('ok', 'refused')


class Sandbox:
    """Runs cases of a module in a child process, which is started again when it dies.

    Args:
        module: A module with ``run(case) -> (kind, detail)``. What it raises is 'failed'.
        seconds: How long a case may take.
        gibibytes: How much address space the child may use beyond what it starts with.
    """

    def __init__(self, module: str, seconds: float = 60, gibibytes: float = 3) -> None:
        self._module, self._seconds, self._gibibytes = module, seconds, gibibytes
        self._process = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115

    def run(self, case: Any) -> Outcome:
        """Run a case."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send(case)
            if not self._pipe.poll(self._seconds):
                detail = self._stacks()
                self.close()
                return Outcome('hung', f'no answer within {self._seconds} s\n{detail}')
            return Outcome(*self._pipe.recv())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait()
            detail = self._tail()
            self.close()
            return Outcome('crashed', f'exit code {code}\n{detail}')

    def _start(self) -> None:
        here, there = Pipe()
        path = [str(REPO), str(HERE), str(REPO / 'tests' / 'ops'), str(REPO / 'tests' / 'configs')]
        path.append(os.environ.get('PYTHONPATH', ''))
        environment = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join(path),
            'OMP_NUM_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '',
        }
        # A folder in which a case may do damage is enough.
        self._folder = tempfile.TemporaryDirectory(prefix='mmvim-fuzz-')
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._module, str(there.fileno()), str(self._gibibytes)],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            cwd=self._folder.name,
        )
        there.close()
        self._pipe = here
        if not here.poll(START_SECONDS) or here.recv() != 'ready':
            raise RuntimeError(f'the sandbox does not start:\n{self._tail()}')

    def _stacks(self) -> str:
        """Where the child is, from its fault handler."""
        self._process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return self._tail()

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 3000))
        return self._log.read().decode(errors='replace')

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._folder.cleanup()
            self._process = None


def serve(module: str, descriptor: int, gibibytes: float) -> None:
    """Be the child."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    pipe = Connection(descriptor)
    run = importlib.import_module(module).run
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    limit = used + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send('ready')
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            answer = run(case)
        except BaseException:
            answer = ('failed', traceback.format_exc()[-4000:])
        pipe.send(answer)


if __name__ == '__main__':
    serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
