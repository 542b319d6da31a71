"""Signatures of other packages, on mmvim's ops: any device, any state size, with gradients.

``selective_scan_fn`` is mamba_ssm's, ``causal_conv1d_fn`` and ``causal_conv1d_update`` are
causal_conv1d's, and ``SelectiveScanCuda`` is mamba-windows-cuda's. Code written for those packages
runs with only its import changed. Features that mmvim lacks raise an error.
"""

import torch
from torch import Tensor, nn

from . import _validation as check
from ._library import compute_dtype
from .causal_conv1d import causal_conv1d, check_width
from .selective_scan import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's ``selective_scan_fn``: channels before time.

    Args:
        u: (b, d, l).
        delta: (b, d, l), dtype of u.
        A: (d, n), negative, float32 (float64 if u is float64). Not complex.
        B: (b, n, l) or (b, g, n, l) in the dtype of u, or constant over time: (d, n) in the dtype
            of A, for which the whole call is computed in that dtype.
        C: Like B; each may have either form, and grouped ones have the same g.
        D: (d,), dtype of A.
        z: (b, d, l), dtype of u.
        delta_bias: (d,), dtype of A.
        delta_softplus: Apply softplus to delta + delta_bias.
        return_last_state: Also return the last state.
        seq_idx: Not in mamba_ssm: see :func:`mmvim.ops.selective_scan`.

    Returns:
        (b, d, l) in the dtype of u; with ``return_last_state`` also (b, d, n) in the dtype of A.

    Raises:
        TypeError: For a wrong type or dtype, complex A, B or C among them.
        ValueError: For a wrong shape, device or value.
    """
    delta_softplus = check.as_flag('delta_softplus', delta_softplus)
    return_last_state = check.as_flag('return_last_state', return_last_state)
    dtype = u.dtype if isinstance(u, Tensor) else None
    u, delta, A, B, C, D, z, delta_bias = time_first(u, delta, A, B, C, D, z, delta_bias)
    out = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
        seq_idx=seq_idx,
    )
    if return_last_state:
        return out[0].transpose(1, 2).to(dtype), out[1]
    return out.transpose(1, 2).to(dtype)


def time_first(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Arguments of :func:`selective_scan_fn` as those of :func:`mmvim.ops.selective_scan`."""
    for name, value in (('A', A), ('B', B), ('C', C)):
        check.check_real(name, value)
    check.check_activation('u', u, 'b d l')
    check.check_rank('A', A, 'd n')
    for name, value in (('delta', delta), ('z', z)):
        if value is not None or name == 'delta':
            check.check_tensor(name, value)
            check.check_shape(name, value, 'b d l', u.shape)
    if B.dim() == 2 or C.dim() == 2:
        # Constant matrices are parameters; the op takes B and C as activations.
        wide = compute_dtype(u.dtype)
        u, delta, B, C, z = (None if x is None else x.to(wide) for x in (u, delta, B, C, z))
    per_channel = B.dim() == 2 or C.dim() == 2
    return (
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _matrix_time_first('B', B, u, A, per_channel),
        _matrix_time_first('C', C, u, A, per_channel),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
    )


def _matrix_time_first(
    name: str, matrix: Tensor, u: Tensor, A: Tensor, per_channel: bool
) -> Tensor:
    """(d, n), (b, n, l) or (b, g, n, l) to (b, l, g, n), with a group per channel on request."""
    b, d, length = u.shape
    n = A.shape[-1]
    if matrix.dim() == 2:
        check.check_shape(name, matrix, 'd n', (d, n))
        return matrix.expand(b, length, d, n)
    if matrix.dim() not in (3, 4):
        raise ValueError(
            f'{name} must have the axes (d, n), (b, n, l) or (b, g, n, l), '
            f'got shape {tuple(matrix.shape)}'
        )
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)
    groups = matrix.shape[1]
    check.check_shape(name, matrix, 'b g n l', (b, groups, n, length))
    if groups < 1 or d % groups:
        raise ValueError(f'the number of groups of {name} must divide d = {d}, got {groups}')
    matrix = matrix.permute(0, 3, 1, 2)
    return matrix.repeat_interleave(d // groups, 2) if per_channel else matrix


def is_silu(activation: str | None) -> bool:
    """Whether an activation, by causal_conv1d's name for it, is SiLU; refuse unknown ones."""
    if activation not in (None, 'silu', 'swish'):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def check_conv_state(name: str, state: Tensor | None, x: Tensor, weight: Tensor) -> None:
    """Refuse unfit initial states, under the caller's name for them."""
    if state is None:
        return
    check.check_tensor(name, state)
    check_width('weight', weight)
    check.check_shape(name, state, 'b d w-1', (*x.shape[:2], weight.shape[1] - 1))
    check.check_dtype(name, state, x.dtype, compute_dtype(x.dtype), why=f'x is {x.dtype}')
    check.check_device(name, state, 'x', x.device)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_conv1d's ``causal_conv1d_fn``: channels before time, any layout in memory.

    Args:
        x: (b, d, l).
        weight: (d, w), w = 2, 3 or 4.
        bias: (d,).
        seq_idx: Number of the sequence that each step belongs to, (b, l), int32, for sequences
            packed into one row, as in :func:`mmvim.ops.causal_conv1d`. Steps of a negative number
            are padding: their output is 0.
        initial_states: (b, d, w-1); with ``seq_idx`` the inputs before the first sequence.
        return_final_states: Also return the last w-1 inputs, with ``seq_idx`` of the last sequence.
        final_states_out: Written to and returned as the final states, (b, d, w-1).
        activation: None, ``'silu'`` or ``'swish'``, the same.

    Returns:
        (b, d, l), dtype of x; with ``return_final_states`` also (b, d, w-1).

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device, activation or combination.
    """
    return_final_states = check.as_flag('return_final_states', return_final_states)
    if final_states_out is not None:
        if not return_final_states:
            raise ValueError('final_states_out needs return_final_states=True')
        check.check_tensor('final_states_out', final_states_out)
    check.check_activation('x', x, 'b d l')
    check_conv_state('initial_states', initial_states, x, weight)
    out = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation='silu' if is_silu(activation) else None,
        initial_state=initial_states,
        return_last_state=return_final_states,
        seq_idx=seq_idx,
    )
    out, states = out if return_final_states else (out, None)
    out = out.transpose(1, 2)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if not return_final_states:
        return out
    if final_states_out is not None:
        check.check_shape('final_states_out', final_states_out, 'b d w-1', states.shape)
        states = final_states_out.copy_(states)
    return out, states


def check_rows(name: str, indices: Tensor, pool: str, rows: int) -> None:
    """Check the rows of a pool of states; only on a CPU, as other devices would have to wait.

    Args:
        name, pool: The caller's names of the two arguments.
        indices: (b,), integers.
        rows: Number of rows of the pool.
    """
    if torch.compiler.is_compiling() or not indices.numel():
        return
    if not rows or (
        indices.device.type == 'cpu' and not 0 <= indices.min() <= indices.max() < rows
    ):
        raise ValueError(f'{name} must be rows of {pool}, which has {rows}')


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """causal_conv1d's ``causal_conv1d_update``: the next step or steps, updating a state in place.

    Args:
        x: (b, d) or (b, d, l).
        conv_state: The last inputs, newest last, (b, d, s) with s >= w-1; overwritten. It carries
            no gradient.
        weight: (d, w), w = 2, 3 or 4.
        bias: (d,).
        activation: None, ``'silu'`` or ``'swish'``, the same.
        cache_seqlens: (b,), integers. If given, ``conv_state`` is a ring buffer in which the next
            input of row i goes to position ``cache_seqlens[i] % s``.
        conv_state_indices: (b,), distinct integers: the row of ``conv_state``, then (any, d, s),
            that belongs to each row of x, or a negative number for padding, whose output is
            0. Only on a CPU are the rows checked to exist.

    Returns:
        The output, with the shape and dtype of x.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a wrong shape, device or activation.
    """
    check.check_tensor('x', x)
    check.check_tensor('conv_state', conv_state)
    check.check_tensor('weight', weight)
    if x.dim() == 2:
        return causal_conv1d_update(
            x.unsqueeze(-1),
            conv_state,
            weight,
            bias,
            activation,
            cache_seqlens,
            conv_state_indices,
        ).squeeze(-1)
    check.check_activation('x', x, 'b d l')
    check.check_rank('conv_state', conv_state, 'b d s')
    check_width('weight', weight)
    check.check_dtype('conv_state', conv_state, *check.ACTIVATION_DTYPES, why='it holds inputs')
    check.check_device('conv_state', conv_state, 'x', x.device)
    b, d, length = x.shape
    size, reach = conv_state.shape[2], weight.shape[1] - 1
    if size < reach:
        raise ValueError(
            f'conv_state must hold at least w-1 = {reach} inputs, '
            f'got shape {tuple(conv_state.shape)}'
        )
    for name, value in (
        ('cache_seqlens', cache_seqlens),
        ('conv_state_indices', conv_state_indices),
    ):
        if value is not None:
            check.check_tensor(name, value)
            check.check_shape(name, value, 'b', (b,))
            check.check_dtype(name, value, torch.int32, torch.int64, why='it counts')
            check.check_device(name, value, 'x', x.device)
    rows = b if conv_state_indices is None else conv_state.shape[0]
    check.check_shape('conv_state', conv_state, 'b d s', (rows, d, size))
    state, new = conv_state.detach(), x.detach()
    if conv_state_indices is not None:
        padded = conv_state_indices < 0
        # No branch on values: padding repeats a row in use, and writes what that writes.
        source = torch.where(padded, padded.long().argsort()[:1], torch.arange(b, device=x.device))
        conv_state_indices = conv_state_indices.long()[source].clamp(min=0)
        check_rows('conv_state_indices', conv_state_indices, 'conv_state', rows)
        state, new = state.index_select(0, conv_state_indices), new[source]
        cache_seqlens = None if cache_seqlens is None else cache_seqlens[source]
    if cache_seqlens is None:
        history = state[..., size - reach :].clone()
        # Unlike cat, copying supports every dtype under autocast.
        updated = state.new_empty((b, d, size + length))
        updated[..., :size], updated[..., size:] = state, new
        updated = updated[..., length:]
    else:
        start = cache_seqlens.long().view(b, 1, 1)
        ring = (start + torch.arange(-reach, 0, device=x.device)) % size
        history = state.gather(2, ring.expand(b, d, reach))
        # Of more inputs than fit, only the last ones stay.
        kept = min(length, size)
        slots = (start + torch.arange(length - kept, length, device=x.device)) % size
        updated = state.scatter(
            2, slots.expand(b, d, kept), new[..., length - kept :].to(state.dtype)
        )
    out = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation='silu' if is_silu(activation) else None,
        initial_state=history if history.dtype == x.dtype else history.to(compute_dtype(x.dtype)),
    ).transpose(1, 2)
    with torch.no_grad():
        if conv_state_indices is None:
            conv_state.copy_(updated)
        else:
            updated = torch.where(padded.all(), state, updated)
            conv_state.index_copy_(0, conv_state_indices, updated)
    return out if conv_state_indices is None else out.masked_fill(padded.view(b, 1, 1), 0)


class SelectiveScanCuda(nn.Module):
    """mamba-windows-cuda's module: a scan that takes and returns the state, on any device.

    Unlike there, the number of states is free, gradients exist with and without a state, and the
    state is kept in float32 (float64 for float64 inputs), so that a sequence in chunks gives the
    result of the whole.
    """

    def forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B_ssm: Tensor,
        C_ssm: Tensor,
        D_ssm: Tensor,
        h_prev: Tensor | None = None,
    ) -> Tensor:
        """Scan.

        Args:
            u: (b, l, d).
            delta: Step sizes (b, l, d), positive.
            A: (d, n), negative.
            B_ssm: (b, l, n).
            C_ssm: (b, l, n).
            D_ssm: (d,).
            h_prev: State before the first step (b, d, n).

        Returns:
            (b, l, d), dtype of u.
        """
        return self.forward_with_state(u, delta, A, B_ssm, C_ssm, D_ssm, h_prev)[0]

    def forward_with_state(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B_ssm: Tensor,
        C_ssm: Tensor,
        D_ssm: Tensor,
        h_prev: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scan as :meth:`forward`, and also return the state after the last step (b, d, n)."""
        check.check_activation('u', u, 'b l d')
        dtype = compute_dtype(u.dtype)
        b, length, d = u.shape
        check.check_tensor('A', A)
        check.check_rank('A', A, 'd n')
        n = A.shape[1]
        for name, value, axes, shape in (
            ('B_ssm', B_ssm, 'b l n', (b, length, n)),
            ('C_ssm', C_ssm, 'b l n', (b, length, n)),
            ('A', A, 'd n', (d, n)),
            ('D_ssm', D_ssm, 'd', (d,)),
            ('h_prev', h_prev, 'b d n', (b, d, n)),
        ):
            if value is None and name == 'h_prev':
                continue
            check.check_tensor(name, value)
            check.check_shape(name, value, axes, shape)
            check.check_device(name, value, 'u', u.device)
            if name in ('B_ssm', 'C_ssm'):
                check.check_dtype(name, value, u.dtype, why='as u')
            elif not value.is_floating_point():
                raise TypeError(f'{name} must have a floating-point dtype, got {value.dtype}')
        return selective_scan(
            u,
            delta,
            A.to(dtype),
            B_ssm,
            C_ssm,
            D_ssm.to(dtype),
            initial_state=None if h_prev is None else h_prev.to(dtype),
            return_last_state=True,
        )
