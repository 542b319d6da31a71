"""The error of the quickstart data, and imports that raise it."""

import importlib
from types import ModuleType

_DISTRIBUTIONS = {'sklearn': 'scikit-learn', 'skimage': 'scikit-image', 'PIL': 'pillow', 'av': 'av'}


class QuickstartDataError(RuntimeError):
    """Quickstart data could not be made; the message says what to do."""


def require(module: str) -> ModuleType:
    """Import an optional module.

    Raises:
        QuickstartDataError: its distribution is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition('.')[0]
        if error.name is None or error.name.partition('.')[0] != top:
            raise
        raise QuickstartDataError(
            f'the quickstart data needs {_DISTRIBUTIONS.get(top, top)}: '
            "pip install 'mmvim[quickstart]' (from a checkout: pip install -e '.[quickstart]')"
        ) from None
