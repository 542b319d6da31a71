"""VMamba's cross scan and cross merge, for every device.

Maps x are (b, c, h, w), with ``in_channel_first=False`` (b, h, w, c); with ``one_by_one`` each
route has its own map, (b, 4, c, h, w) or (b, h, w, 4, c). Sequences y are (b, 4, c, l), with
``out_channel_first=False`` (b, l, 4, c). Merging takes y with l unfolded to (h, w) and returns x
with h and w folded to l. ``scans`` selects the routes: 0 rows, columns, and both from the end; 1
rows four times; 2 rows twice, and twice from the end.
"""

import torch
from torch import Tensor

from mmvim._checks import check_choice
from mmvim.dropin.placeholders import attributes_of
from mmvim.ops import _validation as check

__all__ = [
    'CrossMergeF',
    'CrossMergeTriton',
    'CrossMergeTritonF',
    'CrossScanF',
    'CrossScanTriton',
    'CrossScanTriton1b1',
    'CrossScanTriton1b1F',
    'CrossScanTritonF',
    'cross_merge_fn',
    'cross_scan_fn',
    'getCSM',
]
__getattr__ = attributes_of(__name__)

# For each of the four routes: column by column, and from the end.
_ROUTES = {
    0: ((False, False), (True, False), (False, True), (True, True)),
    1: ((False, False),) * 4,
    2: ((False, False), (False, False), (False, True), (False, True)),
}


def _check(in_channel_first, out_channel_first, one_by_one, scans) -> None:
    check.as_flag('in_channel_first', in_channel_first)
    check.as_flag('out_channel_first', out_channel_first)
    check.as_flag('one_by_one', one_by_one)
    check_choice('scans', scans, tuple(_ROUTES))


def _check_four(name: str, value: Tensor, channel_first: bool) -> None:
    axes = 'b 4 c h w' if channel_first else 'b h w 4 c'
    check.check_rank(name, value, axes)
    k = value.shape[1 if channel_first else 3]
    if k != 4:
        raise ValueError(f'{name} must have 4 routes in ({axes}), got shape {tuple(value.shape)}')


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Read a map along four routes.

    Args:
        x, in_channel_first, out_channel_first, one_by_one, scans: See :mod:`csm_triton`.
        force_torch: No effect.

    Returns:
        The sequences y.
    """
    _check(in_channel_first, out_channel_first, one_by_one, scans)
    check.check_tensor('x', x)
    if one_by_one:
        _check_four('x', x, in_channel_first)
        maps = x.unbind(1 if in_channel_first else 3)
    else:
        check.check_rank('x', x, 'b c h w' if in_channel_first else 'b h w c')
        maps = (x,) * 4
    sequences = []
    for source, (columns, backwards) in zip(maps, _ROUTES[scans], strict=True):
        source = source.movedim(1, 3) if in_channel_first else source
        sequence = (source.transpose(1, 2) if columns else source).flatten(1, 2)
        sequence = sequence.flip(1) if backwards else sequence
        sequences.append(sequence.transpose(1, 2) if out_channel_first else sequence)
    return torch.stack(sequences, 1 if out_channel_first else 2)


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Put four sequences back in their places, and add them unless ``one_by_one``.

    Args:
        y, in_channel_first, out_channel_first, one_by_one, scans: See :mod:`csm_triton`.
        force_torch: No effect.

    Returns:
        The map or maps x.
    """
    _check(in_channel_first, out_channel_first, one_by_one, scans)
    check.check_tensor('y', y)
    _check_four('y', y, out_channel_first)
    y = y.movedim(2, 4) if out_channel_first else y.movedim(3, 1)
    _, _, h, w, _ = y.shape
    maps = []
    for sequence, (columns, backwards) in zip(y.unbind(1), _ROUTES[scans], strict=True):
        sequence = sequence.flatten(1, 2)
        sequence = sequence.flip(1) if backwards else sequence
        if columns:
            sequence = sequence.unflatten(1, (w, h)).transpose(1, 2).flatten(1, 2)
        maps.append(sequence.transpose(1, 2) if in_channel_first else sequence)
    if one_by_one:
        return torch.stack(maps, 1 if in_channel_first else 2)
    first, second, third, fourth = maps
    return ((first + third) + (second + fourth)).contiguous()


class CrossScanF:
    """:func:`cross_scan_fn` for code that calls the autograd function."""

    apply = staticmethod(cross_scan_fn)


class CrossMergeF:
    """:func:`cross_merge_fn` for code that calls the autograd function."""

    apply = staticmethod(cross_merge_fn)


class CrossScanTriton1b1:
    """:func:`cross_scan_fn` of a map for each route."""

    @staticmethod
    def apply(x: Tensor, in_channel_first: bool = True) -> Tensor:
        """Read four maps (b, 4, c, h, w), or (b, h, w, 4, c), each along its route."""
        return cross_scan_fn(x, in_channel_first, one_by_one=True)


CrossScanTriton = CrossScanTritonF = CrossScanF
CrossMergeTriton = CrossMergeTritonF = CrossMergeF
CrossScanTriton1b1F = CrossScanTriton1b1


def getCSM(mode: int = 1) -> tuple[type, type]:
    """The classes of scan and merge whose ``scans`` is ``mode``; each takes one tensor."""
    check_choice('mode', mode, tuple(_ROUTES))

    class Scan:
        @staticmethod
        def apply(x: Tensor) -> Tensor:
            return cross_scan_fn(x, scans=mode)

    class Merge:
        @staticmethod
        def apply(y: Tensor) -> Tensor:
            return cross_merge_fn(y, scans=mode)

    return Scan, Merge
