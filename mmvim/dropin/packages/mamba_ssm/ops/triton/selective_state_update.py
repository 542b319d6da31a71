"""One step of the selective scan."""

import torch
from torch import Tensor

from mmvim import ops
from mmvim.dropin.placeholders import attributes_of
from mmvim.ops import _validation as check
from mmvim.ops._library import compute_dtype, without_autocast
from mmvim.ops.compat import check_rows

__all__ = ['selective_state_update', 'selective_state_update_ref']
__getattr__ = attributes_of(__name__)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Take one step and write the new state to ``state``.

    Args:
        state: (b, d, n), or with heads (b, h, d, n); any floating dtype.
        x, dt, z: (b, d) or (b, h, d).
        A: (d, n) or (h, d, n).
        B, C: (b, n) or (b, g, n), with g dividing h.
        D, dt_bias: (d,) or (h, d).
        dt_softplus: Apply softplus to dt + dt_bias.
        state_batch_indices: (b,), rows of ``state`` that belong to the rows of x.

    Returns:
        The output, with the shape and dtype of x. The state carries no gradient.
    """
    check.check_tensor('state', state)
    if state.dim() not in (3, 4):
        raise ValueError(
            f'state must have the axes (b, d, n) or (b, h, d, n), got shape {tuple(state.shape)}'
        )
    axes = 'd' if state.dim() == 3 else 'h d'
    check.check_tensor('x', x)
    check.check_shape('x', x, f'b {axes}', (*x.shape[:1], *state.shape[1:-1]))
    for name, value in (('dt', dt), ('z', z)):
        if value is not None:
            check.check_tensor(name, value)
            check.check_shape(name, value, f'b {axes}', x.shape)
    for name, value in (('D', D), ('dt_bias', dt_bias)):
        if value is not None:
            check.check_tensor(name, value)
            check.check_shape(name, value, axes, state.shape[1:-1])
    check.check_real('A', A)
    check.check_shape('A', A, f'{axes} n', state.shape[1:])
    for name, value in (('B', B), ('C', C)):
        check.check_tensor(name, value)
        check.check_rank(name, value, 'b n' if state.dim() == 3 else 'b g n')
    if state_batch_indices is not None:
        check.check_tensor('state_batch_indices', state_batch_indices)
        check.check_shape('state_batch_indices', state_batch_indices, 'b', x.shape[:1])
        check.check_dtype(
            'state_batch_indices', state_batch_indices, torch.int32, torch.int64, why='it counts'
        )
        check_rows('state_batch_indices', state_batch_indices, 'state', state.shape[0])
    return _step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


selective_state_update_ref = selective_state_update


@without_autocast
def _step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, rows):
    wide = compute_dtype(x.dtype)
    before = state.detach() if rows is None else state.detach().index_select(0, rows)
    b = x.shape[0]
    u, delta, gate = (None if t is None else t.reshape(b, 1, -1).to(wide) for t in (x, dt, z))
    B, C = (t.reshape(b, 1, -1, t.shape[-1]).to(wide) for t in (B, C))
    skip, bias = (None if t is None else t.reshape(-1).to(wide) for t in (D, dt_bias))
    out, after = ops.selective_scan(
        u,
        delta,
        A.reshape(-1, A.shape[-1]).to(wide),
        B,
        C,
        skip,
        gate,
        bias,
        delta_softplus=check.as_flag('dt_softplus', dt_softplus),
        initial_state=before.reshape(b, -1, state.shape[-1]).to(wide),
        return_last_state=True,
        check_values=False,
    )
    after = after.detach().view(before.shape).to(state.dtype)
    if rows is None:
        state.detach().copy_(after)
    else:
        state.detach().index_copy_(0, rows.long(), after)
    return out.reshape(x.shape).to(x.dtype)
