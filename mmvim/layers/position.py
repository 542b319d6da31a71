"""Positions of tokens: class-token places, resizable and rotary position embeddings."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvim.ops._library import as_compute_dtype
from mmvim.ops.backend import is_exporting

RESIZE_MODES = ('bicubic', 'bilinear', 'nearest', 'nearest-exact', 'area')
CLS_TOKEN_PLACES = ('middle', 'head', 'tail', 'double', 'none')


def token_positions(place: str, num_patches: int) -> tuple[int, ...]:
    """Indices of the class tokens in a sequence of ``num_patches`` patches plus class tokens.

    Args:
        place (str): 'middle' (after ``num_patches // 2`` patches), 'head', 'tail', 'double' (head
            and tail) or 'none'.
        num_patches (int): Number of patches.
    """
    return {
        'middle': (num_patches // 2,),
        'head': (0,),
        'tail': (num_patches,),
        'double': (0, num_patches + 1),
        'none': (),
    }[place]


def insert_tokens(patches: Tensor, tokens: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """Insert tokens so that they end up at ``positions``.

    Args:
        patches (Tensor): (batch, num_patches, dim).
        tokens (Sequence[Tensor]): Each (batch or 1, 1, dim).
        positions (Sequence[int]): Ascending indices in the result.

    Returns:
        Tensor: (batch, num_patches + len(tokens), dim).
    """
    if not positions:
        return patches
    pieces, start = [], 0
    for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        stop = position - i
        pieces += [patches[:, start:stop], token.expand(patches.shape[0], -1, -1)]
        start = stop
    return torch.cat([*pieces, patches[:, start:]], dim=1)


def split_tokens(x: Tensor, positions: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Undo :func:`insert_tokens`: return the patches and the tokens, each (batch, 1, dim).

    The patches are a view of ``x`` if no token lies between them.
    """
    pieces, start = [], 0
    for position in positions:
        pieces.append(x[:, start:position])
        start = position + 1
    pieces = [p for p in [*pieces, x[:, start:]] if p.shape[1]]
    patches = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return patches, [x[:, p : p + 1] for p in positions]


def resize_pos_embed(
    pos_embed: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    place: str = 'none',
    mode: str = 'bicubic',
) -> Tensor:
    """Resize the patches' part of a position embedding; class tokens keep their positions.

    Args:
        pos_embed (Tensor): (1, rows * columns + class tokens, dim).
        source (tuple): Rows and columns of ``pos_embed``.
        target (tuple): Rows and columns of the result.
        place (str): Place of the class token, before and after. Defaults to 'none'.
        mode (str): One of :data:`RESIZE_MODES`, the two-dimensional ones of
            :func:`torch.nn.functional.interpolate`. Defaults to 'bicubic'.

    Returns:
        Tensor: (1, rows * columns + class tokens, dim) for ``target``, in the dtype of
        ``pos_embed``.
    """
    if tuple(source) == tuple(target):
        return pos_embed
    patches, tokens = split_tokens(pos_embed, token_positions(place, source[0] * source[1]))
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting()
    if pos_embed.is_cuda and not is_traced:
        patches = _multiplied(patches, source, target, mode)
    else:
        grid = as_compute_dtype(patches.transpose(1, 2).reshape(1, -1, *source))
        patches = _interpolated(grid, target, mode).flatten(2).transpose(1, 2)
    patches = patches.to(pos_embed.dtype)
    return insert_tokens(patches, tokens, token_positions(place, target[0] * target[1]))


def _interpolated(grid: Tensor, size: Sequence[int], mode: str) -> Tensor:
    align = None if mode in ('nearest', 'nearest-exact', 'area') else False
    return F.interpolate(grid, size=tuple(size), mode=mode, align_corners=align)


def _multiplied(patches: Tensor, source: Sequence[int], target: Sequence[int], mode: str) -> Tensor:
    """Resize ``patches`` (1, rows * columns, dim) by a matrix for either direction.

    torch's CUDA kernels have a thread for each position of ``target``, a block or a few in all,
    which runs through the channels alone and, for the gradient, adds to memory that it shares.
    float64 is exempt from autocast and TF32.
    """
    rows, columns = (
        _interpolated(torch.eye(n, device=patches.device).view(1, n, n, 1), (size, 1), mode)
        .view(n, size)
        .t()
        .double()
        for n, size in zip(source, target, strict=True)
    )
    wide = columns @ patches.double().unflatten(1, tuple(source))
    return (rows @ wide.flatten(2)).unflatten(2, (target[1], -1)).flatten(1, 2)


def rotary_table_2d(
    dim: int,
    grid: tuple[int, int],
    pt_size: int,
    positions: Sequence[int] = (),
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the axial 2-D rotary embedding (RoFormer; EVA-02's variant).

    Channels ``0 .. dim/2`` rotate by the row, the rest by the column; neighbouring channels form
    a pair. Rows and columns are rescaled to the range ``[0, pt_size)``, so that a model sees the
    same angles at each input size. Class tokens are not rotated.

    Args:
        dim (int): Channels, a multiple of 4.
        grid (tuple): Rows and columns of patches.
        pt_size (int): Rows and columns of the grid that the model was trained with.
        positions (Sequence[int]): Indices of the class tokens. Defaults to ().
        theta (float): Base of the frequencies. Defaults to 10000.

    Returns:
        tuple: cos and sin, each (rows * columns + class tokens, dim / 2) float32: one entry for
        each pair of channels.
    """
    half = dim // 2
    frequencies = theta ** -(torch.arange(0, half, 2, device=device).float() / half)
    rows, columns = (
        (torch.arange(n, device=device) / n * pt_size)[:, None] * frequencies for n in grid
    )
    angles = torch.cat(
        (
            rows[:, None].expand(-1, grid[1], -1),
            columns[None].expand(grid[0], -1, -1),
        ),
        dim=-1,
    ).reshape(1, grid[0] * grid[1], half)
    zero = angles.new_zeros(1, 1, half)
    angles = insert_tokens(angles, [zero] * len(positions), positions)[0]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of ``x`` (batch, length, dim) by a :func:`rotary_table_2d`."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
