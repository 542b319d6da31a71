"""The selective scan in PyTorch: one direction, forward and backward, without autograd.

Work proceeds in chunks of time so that only (chunk, b, d, n) values exist at once. Inside a chunk,
tensors are laid out (t, b, g, n, m) with m = d/g channels innermost: every step is contiguous, and
Δ, B and C broadcast without copies. A reverse scan runs through the same memory from its end.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import compute_dtype
from .discretization import TWO_TAP, coefficients, derivatives, phi_of

# Values of (chunk, b, d, n) held per temporary. On a CPU the handful of temporaries should stay in
# the caches; elsewhere a chunk must be long enough to keep the device busy.
_CHUNK_VALUES_CPU = 2**20
_CHUNK_VALUES = 2**24
# A CPU processes a chunk step by step unless a step has fewer values than this. Then, and on other
# devices, where each step would cost a launch, the scan is a tree of logarithmic depth.
_STEP_VALUES_CPU = 2**9


class ScanGradients(NamedTuple):
    """Gradients of one direction; ``y`` is the recomputed output, if requested."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor
    initial_state: Tensor
    y: Tensor | None


def linear_scan_(a: Tensor, h: Tensor, reverse: bool) -> None:
    """In place, h[t+1] += a[t] h[t] with t ascending; or h[t] += a[t] h[t+1], descending.

    Args:
        a: (t, ...), overwritten unless processed step by step.
        h: (t+1, ...).
        reverse: Direction of the walk.
    """
    steps = a.shape[0]
    if steps == 0 or a.numel() == 0:
        return
    if not _in_tree(a):
        coefficient, state = a.unbind(0), h.unbind(0)
        if reverse:
            for t in range(steps - 1, -1, -1):
                state[t].addcmul_(coefficient[t], state[t + 1])
        else:
            for t in range(steps):
                state[t + 1].addcmul_(coefficient[t], state[t])
        return
    if reverse:
        h[-2].addcmul_(a[-1], h[-1])
    else:
        h[1].addcmul_(a[0], h[0])
    _tree_scan_(a, h[:-1] if reverse else h[1:], reverse)


def _tree_scan_(a: Tensor, x: Tensor, reverse: bool) -> None:
    """Work-efficient inclusive scan (Brent and Kung 1982) of x[t] += a[t] x[t-1], in place."""
    length = a.shape[0]
    spans = []
    s = 1
    while 2 * s <= length:
        spans.append(s)
        s *= 2
    for s in spans:
        count = length // (2 * s)
        if reverse:
            to = (length - 2 * s) % (2 * s)
            source = to + s
        else:
            to, source = 2 * s - 1, s - 1
        here, there = slice(to, None, 2 * s), slice(source, None, 2 * s)
        x[here][:count].addcmul_(a[here][:count], x[there][:count])
        a[here][:count].mul_(a[there][:count])
    for s in reversed(spans):
        count = (length - s) // (2 * s)
        if count == 0:
            continue
        if reverse:
            to = (length - 3 * s) % (2 * s)
            source = to + s
        else:
            to, source = 3 * s - 1, 2 * s - 1
        here, there = slice(to, None, 2 * s), slice(source, None, 2 * s)
        x[here][:count].addcmul_(a[here][:count], x[there][:count])


class _Direction:
    """The inputs of one direction, in chunks with the layout of this module."""

    def __init__(
        self, u, delta, A, B, C, D, delta_bias, delta_softplus, method, reverse, seq_idx=None
    ):
        self.u, self.delta, self.B, self.C = u, delta, B, C
        self.batch, self.length, self.channels = u.shape
        self.groups, self.states = B.shape[2:]
        self.width = self.channels // self.groups
        self.dtype = compute_dtype(u.dtype)
        self.A = self.inward(A)
        self.D = None if D is None else D.to(self.dtype)
        self.delta_bias = None if delta_bias is None else delta_bias.to(self.dtype)
        self.delta_softplus, self.method, self.reverse = delta_softplus, method, reverse
        self.two_tap = method in TWO_TAP
        self.kept = None if seq_idx is None else self._kept(seq_idx)
        self.exact_matmul = self.dtype == torch.float64 or _full_precision_matmul()
        self.per_step = self.batch * self.channels * self.states
        budget = _CHUNK_VALUES_CPU if u.device.type == 'cpu' else _CHUNK_VALUES
        self.chunk = max(budget // max(self.per_step, 1), 1)
        self._workspace = {}

    def _kept(self, seq_idx: Tensor) -> Tensor:
        """1 for each step (l, b, 1, 1, 1) that continues a sequence, 0 for one that starts one."""
        same = torch.ones(seq_idx.shape, dtype=self.dtype, device=seq_idx.device)
        steps = same[:, :-1] if self.reverse else same[:, 1:]
        steps.copy_(seq_idx[:, 1:] == seq_idx[:, :-1])
        return same.t()[:, :, None, None, None]

    def coefficients(
        self, where: slice, delta: Tensor, z: Tensor, phi: list[Tensor] | None, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """a, w0 and w1 of a chunk; where a sequence starts, nothing of what was before counts."""
        a, w0, w1 = coefficients(self.method, delta, z, phi, overwrite=overwrite)
        if self.kept is None:
            return a, w0, w1
        return a * self.kept[where], w0, None if w1 is None else w1 * self.kept[where]

    def derivatives(self, chunk: '_Chunk') -> tuple[Tensor | None, ...]:
        """Those of :func:`derivatives`, of the coefficients of :meth:`coefficients`."""
        a_z, w0_delta, w0_z, w1_delta, w1_z = derivatives(
            self.method, chunk.delta, chunk.z, chunk.a, chunk.phi
        )
        if self.kept is not None:
            a_z, w1_delta, w1_z = (
                None if x is None else x * self.kept[chunk.where] for x in (a_z, w1_delta, w1_z)
            )
        return a_z, w0_delta, w0_z, w1_delta, w1_z

    def buffer(self, name: str, steps: int) -> Tensor:
        """Uninitialised (t, b, g, n, m); the same name reuses the same memory.

        Fresh memory for every temporary costs more in page faults than the arithmetic on it.
        """
        if name not in self._workspace:
            largest = min(self.chunk, self.length) + 1
            self._workspace[name] = self.u.new_empty(
                (largest, self.batch, self.groups, self.states, self.width), dtype=self.dtype
            )
        return self._workspace[name][:steps]

    def inward(self, x: Tensor) -> Tensor:
        """(..., d, n) to (..., g, n, m)."""
        x = x.to(self.dtype).unflatten(-2, (self.groups, self.width))
        return x.transpose(-1, -2).contiguous()

    def outward(self, x: Tensor) -> Tensor:
        """(..., g, n, m) to (..., d, n)."""
        return x.transpose(-1, -2).flatten(-3, -2)

    def over_states(self, weight: Tensor, x: Tensor) -> Tensor:
        """Σ_n of weight (t, b, g, n, 1) times x (t, b, g, n, m): (t, b, g, 1, m)."""
        if self.exact_matmul:
            return torch.matmul(weight.transpose(-1, -2), x)
        return (weight * x).sum(-2, keepdim=True)

    def over_channels(self, weight: Tensor, x: Tensor) -> Tensor:
        """Σ_m of weight (t, b, g, 1, m) times x (t, b, g, n, m): (b, t, g, n)."""
        if self.exact_matmul:
            total = torch.matmul(weight, x.transpose(-1, -2)).squeeze(-2)
        else:
            total = (weight * x).sum(-1)
        return total.transpose(0, 1)

    def memory(self, start: int, stop: int) -> slice:
        """Places in memory of the steps from start to stop, in scan order."""
        if self.reverse:
            return slice(self.length - stop, self.length - start)
        return slice(start, stop)

    def channels_of(self, x: Tensor, where: slice) -> Tensor:
        """(b, l, d) to (t, b, g, 1, m)."""
        x = x[:, where].transpose(0, 1).to(self.dtype)
        return x.unflatten(-1, (self.groups, self.width)).unsqueeze(-2)

    def states_of(self, x: Tensor, where: slice) -> Tensor:
        """(b, l, g, n) to (t, b, g, n, 1)."""
        return x[:, where].transpose(0, 1).to(self.dtype).contiguous().unsqueeze(-1)

    def step_size(self, where: slice) -> Tensor:
        """Δ of a chunk."""
        delta = self.delta[:, where].transpose(0, 1).to(self.dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias
        if self.delta_softplus:
            delta = F.softplus(delta)
        return delta.unflatten(-1, (self.groups, self.width)).unsqueeze(-2)

    def start(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """State and previous drive before the first step."""
        shape = (self.batch, self.groups, self.states, self.width)
        zeros = self.u.new_zeros(shape, dtype=self.dtype)
        if initial_state is None:
            return zeros, zeros if self.two_tap else None
        h = self.inward(initial_state[..., : self.states])
        if not self.two_tap:
            return h, None
        v = initial_state[..., self.states :]
        return h, self.inward(v) if v.shape[-1] else zeros

    def previous_drive(self, step: int, initial: Tensor | None) -> Tensor | None:
        """v of the step before ``step`` (in scan order)."""
        if not self.two_tap or step == 0:
            return initial
        where = self.memory(step - 1, step)
        return (self.states_of(self.B, where) * self.channels_of(self.u, where))[0]


class _Chunk:
    """Coefficients and states of one chunk; ``h`` also holds the state before it."""

    def __init__(
        self, scan: _Direction, start: int, stop: int, h: Tensor, v: Tensor | None, last_use: bool
    ):
        steps = stop - start
        self.where = where = scan.memory(start, stop)
        self.u = scan.channels_of(scan.u, where)
        self.delta = scan.step_size(where)
        self.B = scan.states_of(scan.B, where)
        self.z = torch.mul(self.delta, scan.A, out=scan.buffer('z', steps))
        self.phi = phi_of(scan.method, self.z, for_derivatives=not last_use)
        # Without a backward pass z is not needed again; that of 'zoh' needs only a.
        self.coefficients = a, w0, w1 = scan.coefficients(
            where, self.delta, self.z, self.phi, overwrite=last_use or scan.method == 'zoh'
        )
        first, self.last = (steps, 0) if scan.reverse else (0, steps)
        self.now = slice(0, -1) if scan.reverse else slice(1, None)
        self.before = slice(1, None) if scan.reverse else slice(0, -1)
        self.h = scan.buffer('h', steps + 1)
        self.h[first] = h
        drive = self.h[self.now]
        self.v = None
        if scan.method == 'zoh':
            self.w0_u = w0 * self.u
            torch.mul(self.w0_u, self.B, out=drive)
        elif w1 is None:
            torch.mul(w0, self.u, out=drive).mul_(self.B)
        else:
            self.v = scan.buffer('v', steps + 1)
            self.v[first] = v
            torch.mul(self.B, self.u, out=self.v[self.now])
            torch.mul(w0, self.v[self.now], out=drive)
            drive.addcmul_(w1, self.v[self.before])
        self.a = a

    def run(self, reverse: bool, keep_a: bool) -> None:
        """Turn the drive in ``h`` into states."""
        linear_scan_(self.a.clone() if keep_a and _in_tree(self.a) else self.a, self.h, reverse)

    def end(self) -> tuple[Tensor, Tensor | None]:
        """State and drive after the last step."""
        return self.h[self.last], None if self.v is None else self.v[self.last]


def _in_tree(a: Tensor) -> bool:
    """Whether to process the steps of ``a`` (t, ...) in a tree rather than one by one."""
    return a.device.type != 'cpu' or a.numel() < _STEP_VALUES_CPU * a.shape[0]


def _full_precision_matmul() -> bool:
    """Whether float32 matmuls use float32, and not TF32 or bfloat16 by the process's choice."""
    try:
        return torch.get_float32_matmul_precision() == 'highest'
    except RuntimeError:
        # Chosen per device, by the newer interface.
        return False


def _accumulate_(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total += Σ_t x weight, for x (t, b, ...)."""
    if _in_tree(x):
        total += (x * weight).sum(0)
        return
    for x_t, weight_t in zip(x.unbind(0), weight.unbind(0), strict=True):
        total.addcmul_(x_t, weight_t)


def _save_checkpoints(
    checkpoints: Tensor, chunk: _Chunk, scan: _Direction, start: int, stop: int, interval: int
) -> None:
    first = start // interval
    count = min(stop // interval, checkpoints.shape[1]) - first
    if count <= 0:
        return
    at = (first + 1) * interval - start
    if scan.reverse:
        at = (stop - start) - at - (count - 1) * interval
    h = chunk.h[at::interval][:count]
    saved = scan.outward(h.flip(0) if scan.reverse else h)
    checkpoints[:, first : first + count] = saved.transpose(0, 1)


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    method: str,
    reverse: bool,
    return_last_state: bool,
    checkpoint_interval: int,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction, ungated: y (b, l, d) in the compute dtype, last state, checkpoints."""
    scan = _Direction(u, delta, A, B, C, D, delta_bias, delta_softplus, method, reverse, seq_idx)
    y = u.new_empty(u.shape, dtype=scan.dtype)
    checkpoints = u.new_empty(
        checkpoint_shape(u, scan.states, checkpoint_interval), dtype=scan.dtype
    )
    h, v = scan.start(initial_state)
    for start in range(0, scan.length, scan.chunk):
        stop = min(start + scan.chunk, scan.length)
        chunk = _Chunk(scan, start, stop, h, v, last_use=True)
        chunk.run(reverse, keep_a=False)
        y[:, chunk.where] = _output(scan, chunk).transpose(0, 1)
        if checkpoint_interval > 0:
            _save_checkpoints(checkpoints, chunk, scan, start, stop, checkpoint_interval)
        h, v = chunk.end()
    if not return_last_state:
        return y, u.new_empty(0, dtype=scan.dtype), checkpoints
    last = scan.outward(h) if v is None else torch.cat((scan.outward(h), scan.outward(v)), -1)
    return y, last.contiguous(), checkpoints


def _output(scan: _Direction, chunk: _Chunk) -> Tensor:
    """C h + D u of a chunk, (t, b, d)."""
    C = scan.states_of(scan.C, chunk.where)
    y = scan.over_states(C, chunk.h[chunk.now]).flatten(-3)
    if scan.D is not None:
        y.addcmul_(chunk.u.flatten(-3), scan.D)
    return y


def checkpoint_shape(u: Tensor, states: int, interval: int) -> tuple:
    """Shape of the checkpoints of one direction; works for symbolic sizes."""
    if interval == 0:
        return (0,)
    count = torch.sym_max((u.shape[1] - 1) // interval, 0)
    return (u.shape[0], count, u.shape[2], states)


def scan_backward(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    method: str,
    reverse: bool,
    checkpoint_interval: int,
    need_y: bool,
    seq_idx: Tensor | None = None,
) -> ScanGradients:
    """Gradients of :func:`scan_forward`, given that of its y (in the compute dtype).

    States are recomputed chunk by chunk from the checkpoints, last chunk first.
    """
    scan = _Direction(u, delta, A, B, C, D, delta_bias, delta_softplus, method, reverse, seq_idx)
    states = scan.states
    new = {'dtype': scan.dtype, 'device': u.device}
    carry_shape = (scan.batch, scan.groups, states, scan.width)
    # Freshly allocated and contiguous, whatever the strides of the inputs.
    du, ddelta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta))
    dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (B, C))
    dA = torch.zeros(carry_shape, **new)
    dbias = torch.zeros(scan.channels, **new) if delta_bias is not None else torch.empty(0, **new)
    dD = torch.zeros(scan.channels, **new) if D is not None else torch.empty(0, **new)
    y = torch.empty(u.shape, **new) if need_y else None

    # Gradients from later steps with respect to the state and the drive at the end of a chunk.
    carry = torch.zeros(carry_shape, **new)
    carry_v = torch.zeros(carry_shape, **new) if scan.two_tap else None
    if grad_last_state is not None:
        carry = scan.inward(grad_last_state[..., :states])
        if scan.two_tap:
            carry_v = scan.inward(grad_last_state[..., states:])

    for start, stop, h, v in _chunks_backwards(
        scan, initial_state, checkpoints, checkpoint_interval
    ):
        chunk = _Chunk(scan, start, stop, h, v, last_use=False)
        chunk.run(reverse, keep_a=True)
        a, w0, w1 = chunk.coefficients
        where = chunk.where
        if need_y:
            y[:, where] = _output(scan, chunk).transpose(0, 1)
        gy = scan.channels_of(grad_y, where)
        C_t = scan.states_of(C, where)
        h_now, h_before = chunk.h[chunk.now], chunk.h[chunk.before]
        dC[:, where] = scan.over_channels(gy, h_now)

        # The adjoint recurrence: g_t = C_t gy_t + a_{t+1} g_{t+1}, walked against the scan.
        first, last = (-1, 0) if reverse else (0, -1)
        g = torch.mul(gy, C_t, out=scan.buffer('g', stop - start))
        g[last] += carry
        inner = a[:-1] if reverse else a[1:]
        linear_scan_(inner.clone() if _in_tree(inner) else inner, g, not reverse)
        carry = a[first] * g[first]

        a_z, w0_delta, w0_z, w1_delta, w1_z = scan.derivatives(chunk)
        # Gradient with respect to z, and to Δ where it does not act through z.
        gz = torch.mul(g, h_before, out=scan.buffer('gz', stop - start)).mul_(a_z)
        if w0_z is None:
            # w0 is the same for all states: sums over them come first.
            gB = scan.over_states(chunk.B, g)
            dB[:, where] = scan.over_channels(chunk.w0_u, g)
            du_t = gB * w0
            ddelta_t = (gB * chunk.u).mul_(w0_delta)
        else:
            g_v = torch.mul(g, w0, out=scan.buffer('g_v', stop - start))
            if w1 is None:
                gv0 = torch.mul(g, chunk.B, out=scan.buffer('gv0', stop - start)).mul_(chunk.u)
            else:
                gv0 = g * chunk.v[chunk.now]
                gv1 = g * chunk.v[chunk.before]
                gz.addcmul_(gv1, w1_z)
                g_w1 = g * w1
                g_v[last] += carry_v
                if reverse:
                    g_v[1:] += g_w1[:-1]
                else:
                    g_v[:-1] += g_w1[1:]
                carry_v = g_w1[first].clone()
            gz.addcmul_(gv0, w0_z)
            dB[:, where] = scan.over_channels(chunk.u, g_v)
            du_t = scan.over_states(chunk.B, g_v)
            ddelta_t = gv0.mul_(w0_delta).sum(-2, keepdim=True)
            if w1 is not None:
                ddelta_t += gv1.mul_(w1_delta).sum(-2, keepdim=True)
        _accumulate_(dA, gz, chunk.delta)
        ddelta_t += gz.mul_(scan.A).sum(-2, keepdim=True)

        du_t, ddelta_t, u_t, gy_t = (x.flatten(-3) for x in (du_t, ddelta_t, chunk.u, gy))
        if scan.D is not None:
            du_t = torch.addcmul(du_t, gy_t, scan.D)
            dD += (gy_t * u_t).sum((0, 1))
        if delta_softplus:
            # softplus′(x) = 1 − exp(−softplus(x))
            ddelta_t = ddelta_t * torch.expm1(-chunk.delta.flatten(-3)).neg_()
        if delta_bias is not None:
            dbias += ddelta_t.sum((0, 1))
        du[:, where] = du_t.transpose(0, 1)
        ddelta[:, where] = ddelta_t.transpose(0, 1)

    if initial_state is None:
        dinitial = torch.empty(0, **new)
    else:
        dinitial = scan.outward(carry)
        if initial_state.shape[-1] > states:
            dinitial = torch.cat((dinitial, scan.outward(carry_v)), -1)
        dinitial = dinitial.to(initial_state.dtype).contiguous()
    return ScanGradients(
        du, ddelta, scan.outward(dA.sum(0)).to(A.dtype).contiguous(), dB, dC, dD, dbias, dinitial, y
    )


def _chunks_backwards(
    scan: _Direction, initial_state: Tensor | None, checkpoints: Tensor, interval: int
):
    """Yield (start, stop, state before, drive before) of every chunk, the last one first."""
    h0, v0 = scan.start(initial_state)
    # Chunks end at checkpoints; one that would still be too long is divided further, and an extra
    # forward pass over it recomputes its inner states.
    segment = scan.length if interval == 0 else max(scan.chunk // interval, 1) * interval
    for seg_start in reversed(range(0, scan.length, max(segment, 1))):
        seg_stop = min(seg_start + segment, scan.length)
        if seg_start == 0:
            h = h0
        else:
            h = scan.inward(checkpoints[:, seg_start // interval - 1])
        v = scan.previous_drive(seg_start, v0)
        pieces = []
        for start in range(seg_start, seg_stop, scan.chunk):
            stop = min(start + scan.chunk, seg_stop)
            pieces.append((start, stop, h, v))
            if stop < seg_stop:
                chunk = _Chunk(scan, start, stop, h, v, last_use=True)
                chunk.run(scan.reverse, keep_a=False)
                h, v = (None if x is None else x.clone() for x in chunk.end())
        yield from reversed(pieces)
