"""Run a task library's own script with mmvim in place.

``python -m mmvim.run mmdet::train.py CONFIG …`` runs the script that mmdet ships; a path runs any
other. mmvim's repairs of the libraries act as in its own launcher, and ``mmseg::…`` and
``mmvim::…`` resolve in configs, without a line in them.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import mmvim  # noqa: F401 (puts the repairs in place)

_USAGE = 'usage: python -m mmvim.run SCRIPT [ARGUMENT …], SCRIPT a path or mmdet::train.py'


def find_script(name: str) -> Path:
    """Path of a script.

    Args:
        name: A path, or ``LIBRARY::SCRIPT`` for one in the ``tools`` of an installed library.

    Raises:
        FileNotFoundError: There is no such library or script, or it is a shell script.
    """
    if name.endswith('.sh'):
        raise FileNotFoundError(
            f'{name} is no Python script: in its place, torchrun --nproc_per_node 8 -m mmvim.run '
            f'{name.removesuffix(".sh").replace("dist_", "")}.py … --launcher pytorch'
        )
    library, separator, script = name.partition('::')
    if not separator:
        paths = [Path(name)]
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f'{name}: {library} is not installed')
        package = Path(next(iter(spec.submodule_search_locations)))
        # In a wheel, and next to the package of a checkout.
        paths = [package / '.mim' / 'tools' / script, package.parent / 'tools' / script]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f'there is no script {name!r} ({", ".join(map(str, paths))})')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script of the command line.

    Raises:
        SystemExit: That of the script; code 2 if there is no script.
    """
    name, *arguments = [*(sys.argv[1:] if argv is None else argv)] or ['--help']
    if name in ('-h', '--help'):
        sys.exit(_USAGE)
    try:
        path = find_script(name)
    except FileNotFoundError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    runpy.run_path(str(path), run_name='__main__')


if __name__ == '__main__':
    main()
