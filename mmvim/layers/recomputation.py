"""Activation checkpointing of blocks."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]

# torch 2.6 compiles a recomputation that updates batch norm's statistics once more, 2.14 does not;
# versions in between are not known.
_COMPILED_KEEPS_BUFFERS = torch.__version__ >= (2, 14)
_contexts: Contexts | None = None


@contextlib.contextmanager
def recomputing_within(contexts: Contexts) -> Iterator[None]:
    """Take over the random numbers of the blocks that :func:`recomputed` runs in this block.

    Args:
        contexts: Called for each block; returns the contexts in which it runs and reruns, which
            must draw the same numbers. PyTorch no longer saves and restores the generators.
    """
    global _contexts
    before, _contexts = _contexts, contexts
    try:
        yield
    finally:
        _contexts = before


def recomputed(block: nn.Module, *args: Any) -> Any:
    """Run a block, and rerun it in the backward pass instead of keeping its intermediates.

    The running statistics of batch norms count each batch once.
    """
    if not torch.is_grad_enabled():
        return block(*args)
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if torch.compiler.is_compiling():  # which accepts no context_fn
        keeps = _COMPILED_KEEPS_BUFFERS or not norms
        return checkpoint(block, *args, use_reentrant=False) if keeps else block(*args)
    contexts = _contexts

    def run_and_rerun() -> tuple[AbstractContextManager, AbstractContextManager]:
        run, rerun = contexts() if contexts is not None else (nullcontext(), nullcontext())
        return run, _statistics_kept(norms, rerun)

    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=contexts is None,
        context_fn=run_and_rerun,
    )


@contextlib.contextmanager
def _statistics_kept(norms: list[_BatchNorm], context: AbstractContextManager) -> Iterator[None]:
    """Keep a block's second pass from counting its batch twice in the running statistics."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with context:
            yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
