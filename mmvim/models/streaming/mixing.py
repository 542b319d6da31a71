"""Bidirectional mixers over a part of a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvim import ops
from mmvim.layers import BiMamba, MambaState


def mix_part(
    mixer: BiMamba, x: Tensor, state: MambaState | None, keep: int
) -> tuple[Tensor, MambaState]:
    """Mix a part of a sequence: forwards from a state, backwards from the end of the part.

    Args:
        mixer (BiMamba): A mixer with ``bimamba='v2'``.
        x (Tensor): (batch, length, d_model).
        state (MambaState, optional): State of the forward branch before the part.
        keep (int): Number of tokens after which the new state is taken, 1 .. length.

    Returns:
        tuple: (batch, length, d_model), and the forward branch's state after ``keep`` tokens.
    """
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    y, state = _forward_branch(mixer, u[:, :keep], state)
    if keep < u.shape[1]:
        rest, _ = _forward_branch(mixer, u[:, keep:], state)
        y = torch.cat((y, rest), dim=1)
    return _merge(mixer, y, _backward_branch(mixer, u), z), state


def mix_blocks(mixer: BiMamba, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mix a whole sequence, with the backward branch in independent blocks.

    Args:
        mixer (BiMamba): With ``bimamba='v2'``.
        x (Tensor): (batch, length, d_model).
        sizes (Sequence[int]): Tokens of each block; their sum is ``length``.

    Returns:
        Tensor: (batch, length, d_model).
    """
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    y, _ = _forward_branch(mixer, u, None)
    backward = [_backward_branch(mixer, block) for block in u.split(list(sizes), dim=1)]
    return _merge(mixer, y, torch.cat(backward, dim=1), z)


def _merge(mixer: BiMamba, forward: Tensor, backward: Tensor, z: Tensor) -> Tensor:
    y = forward + backward
    if mixer.merge == 'mean':
        y = y * 0.5
    return mixer._project_out(y * F.silu(z))


def _forward_branch(
    mixer: BiMamba, u: Tensor, state: MambaState | None
) -> tuple[Tensor, MambaState]:
    conv, ssm = (None, None) if state is None else state
    u, conv = mixer.conv1d(u, conv, return_state=True)
    inputs = mixer._scan_inputs(u, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    y, ssm = _scan(mixer, inputs, initial_state=ssm, return_last_state=True)
    return y, MambaState(conv, ssm)


def _backward_branch(mixer: BiMamba, u: Tensor) -> Tensor:
    u = mixer.conv1d_b(u)
    inputs = mixer._scan_inputs(u, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b)
    return _scan(mixer, inputs, reverse=True)


def _scan(mixer: BiMamba, inputs: ops.ScanInputs, **options: object):
    return ops.selective_scan(
        *inputs[:6],
        delta_bias=inputs.delta_bias,
        delta_softplus=True,
        discretization=mixer.discretization,
        backend=mixer.ops_backend,
        **options,
        check_values=False,
    )
