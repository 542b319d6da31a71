"""Hidden attention, step sizes and states of a model's scans.

Given its step sizes and matrices, a selective scan is linear in its input u, so each of its
channels is a matrix over the tokens: its *hidden attention* (Ali, Zimerman and Wolf: The
Hidden Attention of Mamba Models, https://arxiv.org/abs/2403.01590).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmvim.layers import SS2D
from mmvim.layers.mamba import MixerBase
from mmvim.ops import ROUTES, intercept_ops
from mmvim.ops._library import compute_dtype
from mmvim.ops.discretization import coefficients


@dataclass(frozen=True)
class Scan:
    """The inputs of one direction of a scan; tokens are in the order of memory.

    Attributes:
        layer: Name of the mixer in the model.
        direction: 'forward', 'backward', or one of :data:`mmvim.ops.ROUTES`.
        order: Tokens in the order in which the scan visits them.
        u: Input (b, l, d).
        delta: Step sizes (b, l, d), bias and softplus applied.
        A: (d, n).
        B: (b, l, g, n); channel c uses group c // (d / g).
        C: Like B.
        D: (d,), or None.
        discretization: One of :data:`mmvim.ops.DISCRETIZATIONS`.
    """

    layer: str
    direction: str
    order: Sequence[int]
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    discretization: str

    def _of_channels(self, x: Tensor, token: int) -> Tensor:
        """(b, d, n) of a token from (b, l, g, n)."""
        return x[:, token].repeat_interleave(self.u.shape[2] // x.shape[2], dim=1)

    def steps(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None, Tensor, Tensor]]:
        """Token, a, w0, w1 and the token's B and C, each (b, d, n), in the order of the scan."""
        for token in self.order:
            step = self.delta[:, token].unsqueeze(-1)
            a, w0, w1 = coefficients(self.discretization, step, step * self.A)
            yield token, a, w0, w1, *(self._of_channels(x, token) for x in (self.B, self.C))


def record_scans(
    model: nn.Module, *inputs: Any, forward: Callable[..., Any] | None = None
) -> list[Scan]:
    """Run a model without gradients and record the inputs of its scans, in the order of the calls.

    Args:
        model: A model with mixers of :mod:`mmvim.layers`.
        *inputs: Inputs of the forward pass.
        forward: Function to call with them. Defaults to None: the model.

    Raises:
        ValueError: No scan ran, or one with an initial state (streaming).
    """
    scans: list[Scan] = []
    with torch.no_grad(), _recorded(model, scans):
        (forward or model)(*inputs)
    if not scans:
        raise ValueError(f'no scan ran in {type(model).__name__}')
    return scans


@contextlib.contextmanager
def _recorded(model: nn.Module, scans: list[Scan]) -> Iterator[None]:
    current = ['']

    def keep(
        direction: str,
        order: Sequence[int],
        softplus: bool,
        method: str,
        *parts: Tensor | None,
    ) -> None:
        u, delta, A, B, C, D, bias = parts
        dtype = compute_dtype(u.dtype)
        delta = delta.to(dtype) if bias is None else delta.to(dtype) + bias
        delta = F.softplus(delta) if softplus else delta
        u, B, C = (x.to(dtype) for x in (u, B, C))
        scans.append(Scan(current[0], direction, order, u, delta, A, B, C, D, method))

    def line(reverse: bool, softplus: bool, method: str, *parts: Tensor | None) -> None:
        order = range(parts[0].shape[1])
        keep(
            'backward' if reverse else 'forward',
            order[::-1] if reverse else order,
            softplus,
            method,
            *parts,
        )

    def refuse_packed(seq_idx: Sequence[Tensor | None]) -> None:
        if any(x is not None for x in seq_idx):
            raise ValueError(
                'a row of packed sequences (seq_idx) has no hidden attention: give each a row'
            )

    def selective_scan(op: Callable, *args: Any) -> Any:
        u, delta, A, B, C, D, _, bias, state, softplus, method, reverse = args[:12]
        refuse_packed(args[14:])
        if state is not None:
            raise ValueError('a scan that continues from a state has no hidden attention')
        line(reverse, softplus, method, u, delta, A, B, C, D, bias)
        return op(*args)

    def bidirectional_scan(op: Callable, *args: Any) -> Any:
        softplus, method = args[16], args[17]
        refuse_packed(args[19:])
        line(False, softplus, method, *args[:7])
        line(True, softplus, method, *args[7:14])
        return op(*args)

    def cross_scan(op: Callable, *args: Any) -> Any:
        x, delta, weight, A, B, C, D, bias, routes, softplus, method, _ = args
        positions = torch.arange(x.shape[1] * x.shape[2]).view(x.shape[1:3])
        for k, route in enumerate(routes):
            order = (positions.t() if route & 1 else positions).flatten().tolist()
            step, *matrices = (t[:, :, :, k].flatten(1, 2) for t in (delta, B, C))
            if weight is not None:
                step = F.linear(step.to(A.dtype), weight[k].to(A.dtype))
            B_k, C_k = (t.unsqueeze(2) for t in matrices)
            skip, bias_k = (None if t is None else t[k] for t in (D, bias))
            inputs = x.flatten(1, 2), step, A[k], B_k, C_k, skip, bias_k
            keep(ROUTES[route], order[::-1] if route >= 2 else order, softplus, method, *inputs)
        return op(*args)

    def enter(name: str, *_: Any) -> None:
        current[0] = name

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            intercept_ops(
                selective_scan=selective_scan,
                bidirectional_scan=bidirectional_scan,
                cross_scan=cross_scan,
            )
        )
        for name, mixer in model.named_modules():
            if isinstance(mixer, (MixerBase, SS2D)):
                hook = functools.partial(enter, name)
                stack.callback(mixer.register_forward_pre_hook(hook).remove)
        yield


def hidden_attention(scan: Scan, *, reduce: str | None = None) -> Tensor:
    r"""The matrix of each channel: :math:`y_t = \sum_s α_{t,s} u_s + D u_t`.

    .. math::
        α_{t,s} = C_t \Big(\prod_{k=s+1}^{t} a_k\Big) w_{0,s} B_s, \quad s \le t

    in the order of the scan, and for two-tap methods also the contribution of s to its successor.
    Takes b·d·n·l values of memory while it runs.

    Args:
        scan: Result of :func:`record_scans`.
        reduce: None for every channel, 'abs' for the mean over channels of absolute values,
            'mean' for the mean. Defaults to None.

    Returns:
        Rows are outputs, columns inputs, both in the order of memory: (b, d, l, l), or (b, l, l).

    Raises:
        ValueError: ``reduce`` is unknown.
    """
    if reduce not in (None, 'abs', 'mean'):
        raise ValueError(f"reduce must be None, 'abs' or 'mean', got {reduce!r}")
    batch, length, channels = scan.u.shape
    # The share of each input in the state.
    share = scan.u.new_zeros(batch, channels, scan.A.shape[1], length)
    rows: list[Tensor | None] = [None] * length
    previous = None
    for token, a, w0, w1, B, C in scan.steps():
        share *= a.unsqueeze(-1)
        share[..., token] = w0 * B
        if w1 is not None and previous is not None:
            share[..., previous[0]] += w1 * previous[1]
        previous = token, B
        row = torch.einsum('bdnl,bdn->bdl', share, C)
        if reduce is not None:
            row = (row.abs() if reduce == 'abs' else row).mean(1)
        rows[token] = row
    return torch.stack(rows, dim=-2)


def state_norms(scan: Scan) -> Tensor:
    """Root mean square of the scan's state over channels and states, after each token: (b, l)."""
    batch, length, channels = scan.u.shape
    h = scan.u.new_zeros(batch, channels, scan.A.shape[1])
    norms = scan.u.new_empty(batch, length)
    previous = None
    for token, a, w0, w1, B, _ in scan.steps():
        drive = scan.u[:, token].unsqueeze(-1) * B
        h = a * h + w0 * drive
        if w1 is not None and previous is not None:
            h = h + w1 * previous
        previous = drive
        norms[:, token] = h.square().mean(dim=(1, 2)).sqrt()
    return norms
