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
from collections import Counter
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
START_SECONDS = 300


class Outcome(NamedTuple):
    """Outcome of a case.

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
        module: A module with ``run(case) -> (kind, detail)``; what that raises is 'failed'. Its
            ``prepare()``, if it has one, is called once before the memory is limited.
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
        try:
            ready = here.poll(START_SECONDS) and here.recv()
        except EOFError:
            ready = None
        if not ready:
            raise RuntimeError(f'the sandbox does not start:\n{self._tail()}')

    def _stacks(self) -> str:
        """The child's position, from its fault handler."""
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


def fuzz(
    strategy: Any, sandbox: Sandbox, count: Any, cases: int, *, always_the_same: bool = False
) -> None:
    """Run cases that hypothesis draws, until one is not good, which it then makes smaller.

    Args:
        strategy: Gives the cases.
        sandbox: Runs them.
        count: The fixture of that name.
        cases: How many.
        always_the_same: Whether the cases are the same in every run.
    """
    from hypothesis import HealthCheck, given, settings

    kinds = Counter()

    @settings(
        max_examples=cases,
        derandomize=always_the_same,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case: Any) -> None:
        outcome = sandbox.run(case)
        kinds[outcome.kind] += 1
        assert outcome.good, f'{outcome.kind}: {outcome.detail}'

    try:
        run()
    finally:
        count('cases', kinds.total())
        for kind in ('refused', 'crashed', 'hung'):
            count(kind, kinds[kind])
    # Else it is not the package that is being tested.
    assert kinds['ok'] * 100 >= cases, kinds
    assert kinds['refused'] * 10 >= cases, kinds


def serve(module: str, descriptor: int, gibibytes: float) -> None:
    """Be the child."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    pipe = Connection(descriptor)
    target = importlib.import_module(module)
    run = target.run
    # What is imported later would count against the limit.
    getattr(target, 'prepare', lambda: None)()
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
