"""Names that can be imported, inherited from and compared, and that raise when they are used."""

import importlib
from collections.abc import Callable

#: Names that the real modules import from others, and that some code takes from them.
FROM_OTHERS = {'Optional': 'typing', 'rearrange': 'einops', 'repeat': 'einops'}


def missing(module: str, name: str) -> NotImplementedError:
    """The error for the use of a name that mmvim does not provide, with what it takes."""
    package = 'causal_conv1d' if module.startswith('causal_conv1d') else 'mamba_ssm'
    prefix = package.removesuffix('_ssm').upper()
    return NotImplementedError(
        f'{module}.{name} is not among the functions that mmvim.dropin provides. It needs the own '
        f'files of {package}, which mmvim serves without a compiler: {prefix}_FORCE_BUILD=TRUE '
        f'{prefix}_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation '
        f'{package.replace("_", "-")}; and a GPU if it is a function in Triton'
    )


class _Missing(type):
    """Class of the placeholders: classes themselves, for code that inherits from them."""

    def __call__(cls, *args: object, **kwargs: object) -> None:
        raise missing(cls.__module__, cls.__qualname__)

    def __getattr__(cls, name: str) -> type:
        return _placeholder(cls.__module__, f'{cls.__qualname__}.{name}')


def _placeholder(module: str, name: str) -> type:
    if name.rpartition('.')[2].startswith('__'):
        raise AttributeError(f'module {module!r} has no attribute {name!r}')
    return _Missing(name, (), {'__module__': module, '__qualname__': name})


def attributes_of(module: str, *names: str) -> Callable[[str], type]:
    """A ``__getattr__`` for a module: a placeholder for each name that it and its imports lack.

    Args:
        module: The module's name.
        *names: The only names that have one, for a module that others search with ``hasattr``;
            without any, all have.
    """
    known: dict[str, type] = {}

    def get(name: str) -> type:
        if names and name not in names:
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        if name in FROM_OTHERS:
            return getattr(importlib.import_module(FROM_OTHERS[name]), name)
        if name not in known:
            known[name] = _placeholder(module, name)
        return known[name]

    return get
