"""Values whose type differs from a declaration, however it is written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Protocol, Union

import pytest
import torch

from mmvim._arguments import misfits, parameters


class Reader(Protocol):
    def read(self) -> str: ...


class Base:
    def __init__(self, width: int = 1, *, names: 'Sequence[str]' = (), undeclared=0.5):
        pass


class Part(Base):
    def __init__(
        self,
        kind: str,
        rate: 'float | torch.Tensor' = 0.1,
        step: dict | Base | None = None,
        size: Union[int, tuple[int, int]] = 3,  # noqa: UP007
        place: Optional[Path] = None,  # noqa: UP045
        mode: Literal['a', 'b'] = 'a',
        table: Mapping[str, int] = {},
        anything: Any = 1,
        reader: Reader | None = None,
        function: Callable = print,
        unknown: 'NotImported' = 1,  # noqa: F821
        **kwargs,
    ):
        pass


def test_arguments_of_all_bases():
    names = [parameter.name for parameter in parameters(Part)]
    assert names[:2] == ['kind', 'rate']
    assert names[-3:] == ['width', 'names', 'undeclared']
    assert not list(parameters('Part'))


def declared(width: int, rate: float | torch.Tensor, step: dict | Base | None, **kwargs: Any):
    """Stand for a function of a library."""


@pytest.mark.parametrize(
    'given',
    [
        {'width': 2, 'names': ['a'], 'undeclared': 1},
        {'width': True, 'names': ('a',)},
        {'names': [{'type': 'of a part'}], 'not_an_argument': []},
        {'kind': 'a', 'anything': [], 'function': 'print', 'reader': 1, 'unknown': []},
    ],
)
def test_fitting_values(given):
    assert misfits(Part, given) == []
    assert misfits(Base, given) == []


def test_values_that_do_not_fit():
    assert misfits(Base, {'width': 'x'}) == ["width='x' must be int"]
    assert misfits(Base, {'names': 3, 'undeclared': []}) == [
        'names=3 must be collections.abc.Sequence[str]',
        'undeclared=[] must be float, as 0.5 is',
    ]
    assert misfits(declared, {'rate': 1, 'step': {'type': 'Part'}}) == []
    assert misfits(declared, {'rate': [1]}) == ['rate=[1] must be float | torch.Tensor']
    assert misfits(declared, {'step': 3}) == [f'step=3 must be dict | {__name__}.Base | None']
    assert misfits(Part, {'place': {'a': 7}}) == ["place={'a': 7} must be pathlib.Path | None"]
    assert misfits(declared, {'width': None, 'step': None}) == ['width=None must be int']
    assert misfits(declared, {'width': None}, none=False) == []
    assert misfits(Part, {'size': 'x'}) == ["size='x' must be int | tuple[int, int]"]
    # An unknown name in one declaration hides no other.
    wrong = {'kind': [7], 'size': 'x', 'place': 7, 'mode': 7, 'table': []}
    assert [text.split('=')[0] for text in misfits(Part, wrong)] == list(wrong)
