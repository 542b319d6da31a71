"""Run a script of ``tools/`` in this process, as ``python script arguments`` would."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin

TOOLS = Path(__file__).parents[1] / 'tools'


def run_script(script: str, *args: object) -> SimpleNamespace:
    """Return ``returncode``, ``stdout`` and ``stderr``; errors that are no exit propagate."""
    out, err = io.StringIO(), io.StringIO()
    argv = [str(TOOLS / script), *map(str, args)]
    logger = MMLogger.get_current_instance()
    level, code = logger.level, 0
    with (
        mock.patch.object(sys, 'argv', argv),
        mock.patch.object(sys, 'path', list(sys.path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(argv[0], run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        finally:
            logger.setLevel(level)
            _forget_runs(ManagerMixin)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def _forget_runs(manager: type) -> None:
    """Drop what mmengine keeps by the second in which a run starts: a script ends its process."""
    for kind in manager.__subclasses__():
        if kind is not MMLogger:
            kind._instance_dict.clear()
            _forget_runs(kind)
