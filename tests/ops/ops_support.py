"""Inputs, and the bound on errors, that the tests of the ops share."""

import pytest
import torch

from mmvim.ops import extension

HALF = (torch.bfloat16, torch.float16)


def need(backend, op, device, *dtypes):
    """Skip where this backend has no such op."""
    if backend == 'compiled':
        for dtype in dtypes:
            if not extension.supports(op, device, dtype):
                pytest.skip(f'no compiled {op} for {dtype} on {device}')


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64, device='cpu'):
    """Normal numbers that do not depend on dtype (but for rounding) or device."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)


PARAMETERS = ('A', 'D', 'delta_bias', 'delta_weight', 'weight', 'bias')


def scan_inputs(
    b,
    length,
    d,
    n,
    groups=None,
    *,
    dtype=torch.float64,
    device='cpu',
    optional=True,
    seed=0,
):
    """The tensors of a selective scan, by name; those of half precision are exact in float64."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    matrix = (b, length, n) if groups is None else (b, length, groups, n)
    shapes = {
        'u': (b, length, d),
        'delta': (b, length, d),
        'A': (d, n),
        'B': matrix,
        'C': matrix,
    }
    if optional:
        shapes |= {'D': (d,), 'z': (b, length, d), 'delta_bias': (d,)}
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        is_parameter = name in ('A', 'D', 'delta_bias')
        value = randn(*shape, seed=100 * seed + i)
        if name == 'A':
            # From slow to fast decay, as the states of a trained model.
            value = -torch.exp(0.5 * value + torch.linspace(-2, 2, n, dtype=torch.float64))
        if name == 'delta_bias':
            value = value - 1
        tensors[name] = value.to(device, parameter if is_parameter else dtype)
    return tensors


def cross_scan_inputs(
    b, h, w, d, n, routes=4, rank=None, *, dtype=torch.float64, device='cpu', optional=True
):
    """The tensors of a cross scan, by name."""
    parts = [
        scan_inputs(b, h * w, d, n, dtype=dtype, device=device, optional=optional, seed=i + 1)
        for i in range(routes)
    ]
    tensors = {'x': parts[0]['u'].view(b, h, w, d)}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ('delta', 'B', 'C'):
            tensors[name] = torch.stack(values, 2).unflatten(1, (h, w))
        elif name in PARAMETERS:
            tensors[name] = torch.stack(values)
    if rank is not None:
        tensors['delta'] = tensors['delta'][..., :rank].clone()
        weight = randn(routes, d, rank, seed=7) / rank**0.5
        tensors['delta_weight'] = weight.to(device, dtype)
    return tensors


def wide(tensors):
    """float64 copies on the CPU."""
    return {k: None if v is None else v.detach().cpu().double() for k, v in tensors.items()}


def assert_error_bounded(names, got, plain, exact, *, slack=4.0):
    """``got`` errs at most twice as much as ``plain``, which torch computed in the same precision.

    Errors are the largest absolute ones against ``exact`` (float64). A few units in the last place
    of the largest value are always allowed, since ``plain`` may be right by luck; more of them for
    the gradients of parameters, which are sums over all steps in an order that is free.
    """
    steps = got[0].shape[0] * got[0].shape[1] if got[0].dim() == 3 else got[0].numel()
    for name, value, own, truth in zip(names, got, plain, exact, strict=True):
        assert value.shape == truth.shape, name
        if truth.numel() == 0:
            continue
        eps = torch.finfo(value.dtype).eps
        error = (value.detach().cpu().double() - truth).abs().max().item()
        allowed = (own.detach().cpu().double() - truth).abs().max().item()
        units = slack + 0.5 * steps**0.5 if name.startswith(PARAMETERS) else slack
        floor = units * eps * truth.abs().max().item()
        assert error <= 2 * allowed + floor, (
            f'{name}: error {error:.2e}, torch {allowed:.2e}, floor {floor:.2e}'
        )


def gradients(outputs, inputs, *, cast=None):
    """Gradients of a fixed random weighting of the outputs, rounded as the tensors ``cast`` are."""
    pairs = []
    for i, x in enumerate(outputs):
        if x.requires_grad:
            rounded = x.dtype if cast is None else cast[i].dtype
            pairs.append((x, randn(*x.shape, seed=1000 + i).to(rounded).to(x.device, x.dtype)))
    return torch.autograd.grad(
        [x for x, _ in pairs],
        inputs,
        [g for _, g in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
