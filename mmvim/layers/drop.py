"""Stochastic depth."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmvim._checks import check_number
from mmvim.ops._autocast import autocast_dtype
from mmvim.ops._library import compute_dtype

from .fusion import calls_are_watched, is_hooked


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al., https://arxiv.org/abs/1603.09382).

    In training, a sample of the batch is zeroed with probability ``drop_prob`` and scaled by
    ``1 / (1 - drop_prob)`` otherwise. In evaluation it is the identity.

    Args:
        drop_prob (float): Probability, in [0, 1). Defaults to 0.

    Raises:
        ValueError: If ``drop_prob`` is not in [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_number('drop_prob', drop_prob, 0, 1)
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of ``x`` (batch, ...)."""
        factors = self.factors(x)
        return x if factors is None else x * factors

    def factors(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Draw what ``x`` (batch, ...) is to be multiplied by: (batch, 1, ...), or None for 1.

        The dtype is that of ``x`` unless another one is given.
        """
        if self.drop_prob == 0 or not self.training:
            return None
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=dtype).bernoulli_(keep)
        return mask.div_(keep)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'drop_prob={self.drop_prob:.4g}'


_FORWARD = DropPath.forward


def is_plain_drop_path(drop_path: nn.Module) -> bool:
    """Whether multiplying by its factors means as much as calling it."""
    return (
        type(drop_path) is DropPath
        and DropPath.forward is _FORWARD
        and 'forward' not in drop_path.__dict__
        and not is_hooked(drop_path)
        and not calls_are_watched()
    )


def deferred(drop_path: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` and what it is still to be multiplied by.

    Where there is nothing to multiply by, or a call of the module means more than that, it is
    called, and nothing is left to be done.
    """
    if not is_plain_drop_path(drop_path):
        return drop_path(x), None
    factors = drop_path.factors(x)
    return (drop_path(x), None) if factors is None else (x, factors)


def drawn_together(drop_paths: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """Draw for tensors of the kind of ``x`` (batch, ...) what each is to be multiplied by.

    Returns:
        Tensor | None: (len(drop_paths), batch), in the dtype of x or of autocast. None if there is
        nothing to multiply by, or a call of one of the modules means more than that.
    """
    if torch.compiler.is_compiling() or not all(map(is_plain_drop_path, drop_paths)):
        return None
    keep = tuple(1 - m.drop_prob if m.training else 1.0 for m in drop_paths)
    return factors_of(keep, x)


def factors_of(keep: tuple[float, ...], x: Tensor) -> Tensor | None:
    """Factors of the samples of ``x``, (len(keep), batch), from the probabilities not to drop."""
    if min(keep, default=1.0) == 1:
        return None
    dtype = autocast_dtype(x) or x.dtype
    # What is made under modes and transforms is theirs alone.
    transformed = (
        torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    )
    made = _on_device.__wrapped__ if transformed else _on_device
    kept = made(keep, x.device, compute_dtype(dtype))
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        _read_by_graphs.add(kept)
    return x.new_empty((len(keep), x.shape[0]), dtype=dtype).bernoulli_(kept).div_(kept)


# Once, as the host waits for a copy to a GPU. Rates that a schedule changes are forgotten again.
@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).unsqueeze(1)


# A captured graph does not keep what it reads.
_read_by_graphs: set[Tensor] = set()


def add_dropped(drop_path: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
    """Return ``x`` plus what stochastic depth leaves of ``branch``."""
    branch, factors = deferred(drop_path, branch)
    if factors is None:
        return x + branch
    if x.dtype != branch.dtype:
        return x + branch * factors
    return torch.addcmul(x, branch, factors)
