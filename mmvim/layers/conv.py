"""Causal depthwise convolution over (batch, length, dim)."""

import math

import torch
from torch import Tensor, nn

from mmvim import ops
from mmvim._checks import check_choice, check_positive
from mmvim.ops.backend import BACKENDS


class CausalConv1d(nn.Module):
    """Causal depthwise convolution, channels last.

    Output ``t`` sees the inputs ``t - kernel_size + 1 .. t`` and nothing else. Parameters have the
    names and shapes of a depthwise :class:`torch.nn.Conv1d`: ``weight`` (dim, 1, kernel_size) and
    ``bias`` (dim,).

    Args:
        dim (int): Channels.
        kernel_size (int): Kernel size, 2 to 4. Defaults to 4.
        bias (bool): Whether there is a bias. Defaults to True.
        activation (str, optional): None or 'silu'. Defaults to None.
        mode (str): 'causal'; 'reverse' looks into the future instead (flip, convolve, flip);
            'same' centres the kernel like torch's padding='same' and has no state.
            Defaults to 'causal'.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 4,
        bias: bool = True,
        activation: str | None = None,
        mode: str = 'causal',
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        check_choice('kernel_size', kernel_size, (2, 3, 4))
        check_choice('activation', activation, (None, 'silu'))
        check_choice('mode', mode, ('causal', 'reverse', 'same'))
        self.dim = dim
        self.kernel_size = kernel_size
        self.activation = activation
        self.mode = mode
        check_choice('ops_backend', ops_backend, BACKENDS)
        self.ops_backend = ops_backend
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        else:
            self.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.Conv1d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.kernel_size)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def taps(self) -> Tensor:
        """The weight in the shape of the ops, (dim, kernel_size)."""
        return self.weight.squeeze(1)

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the state before the first token: zeros (batch_size, dim, kernel_size - 1)."""
        return torch.zeros(
            batch_size,
            self.dim,
            self.kernel_size - 1,
            device=self.weight.device if device is None else device,
            dtype=self.weight.dtype if dtype is None else dtype,
        )

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x (Tensor): (batch, length, dim).
            state (Tensor, optional): (batch, dim, kernel_size - 1), the last inputs of the
                previous chunk, oldest first. Never modified. Defaults to zeros.
            return_state (bool): Whether to return the new state as well. Defaults to False.
            seq_idx (Tensor, optional): (batch, length) int32, the number of each step's sequence
                where a row holds several, as in :func:`mmvim.ops.causal_conv1d`.

        Returns:
            Tensor or tuple: Output like ``x``, and the state after it with ``return_state``.
        """
        return ops.causal_conv1d(
            x,
            self.taps,
            self.bias,
            activation=self.activation,
            mode=self.mode,
            initial_state=state,
            return_last_state=return_state,
            seq_idx=seq_idx,
            backend=self.ops_backend,
        )

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve one token (batch, dim); returns its output and the new state."""
        out, state = self.forward(x.unsqueeze(1), state, return_state=True)
        return out.squeeze(1), state

    def extra_repr(self) -> str:
        """Describe the layer."""
        return (
            f'{self.dim}, kernel_size={self.kernel_size}, bias={self.bias is not None}, '
            f'activation={self.activation!r}, mode={self.mode!r}'
        )
