"""``python -m mmvim.dropin script.py …``: run a program that imports mamba_ssm, unchanged."""

import argparse
import os
import runpy
import sys

from .finder import VARIABLE, install, status

USAGE = """python -m mmvim.dropin [--override] script.py [arguments …]
       python -m mmvim.dropin [--override] -m module [arguments …]
       python -m mmvim.dropin [--override] --check"""


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, which end with ``-m module`` or before the script, and the program's."""
    for i, word in enumerate(arguments):
        if not word.startswith('-'):
            return arguments[:i], arguments[i:]
        if word.startswith('-m'):
            end = i + 2 if word == '-m' else i + 1
            return arguments[:end], arguments[end:]
    return arguments, []


def main(arguments: list[str]) -> int:
    """Parse our own options, then become the program."""
    parser = argparse.ArgumentParser('mmvim.dropin', usage=USAGE, description=__doc__)
    parser.add_argument('--override', action='store_true', help='also replace installed packages')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--check', action='store_true', help='say where each name comes from')
    what.add_argument('-m', dest='module', metavar='module', help='run a module as a script')
    own, rest = _split(arguments)
    options = parser.parse_args(own)
    script = rest.pop(0) if rest and options.module is None else None
    if script is None and options.module is None and not options.check:
        parser.error('name a script, a module with -m, or --check')
    if options.check and (script is not None or rest):
        parser.error('--check takes no program')

    install(options.override)
    if options.check:
        for name, state, detail in status():
            print(f'{name:30}{state:11}{detail}')
        return 0
    # For the processes that the program starts.
    os.environ[VARIABLE] = 'override' if options.override else '1'
    if options.module is not None:
        sys.argv[:] = [options.module, *rest]
        runpy.run_module(options.module, run_name='__main__', alter_sys=True)
    else:
        if not os.path.isfile(script):
            parser.error(f'there is no file {script}')
        sys.argv[:] = [script, *rest]
        # As Python does: the folder of the script takes the place of the working folder.
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
