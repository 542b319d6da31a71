"""Pre-norm blocks and stacks of Mamba mixers."""

import weakref

import torch
from torch import Tensor, nn

from mmvim._checks import check_choice, check_number, check_positive
from mmvim.ops.backend import is_exporting, is_intercepted
from mmvim.ops.mixer import AddNorm, mixer_stack, serves

from .bimamba import BiMamba
from .drop import DropPath, deferred, drawn_together, factors_of, is_plain_drop_path
from .fusion import Fusable, Parts, Snapshot, calls_are_watched, is_hooked, parts
from .mamba import Mamba, MambaState, packed
from .norm import RMSNorm, build_norm
from .recomputation import recomputed

# Devices on which blocks may be run in one call.
STACK_DEVICES = ('cpu', 'cuda')


def drop_path_rates(drop_path_rate: float, depth: int) -> list[float]:
    """Stochastic-depth rates of a stack: one for the input of each layer and one for the output.

    A block adds its input, the output of the previous layer, to the residual stream, so layer ``i``
    drops the output of layer ``i - 1``: ``[0] + linspace(0, drop_path_rate, depth)`` for the inputs
    (the last of which is unused) and ``drop_path_rate`` for the output of the last layer.

    Raises:
        ValueError: If ``drop_path_rate`` is not in [0, 1).
    """
    check_number('drop_path_rate', drop_path_rate, 0, 1)
    if depth == 1:
        return [0.0, drop_path_rate]
    inner = [drop_path_rate * i / (depth - 1) for i in range(depth - 1)]
    return [0.0, *inner, drop_path_rate]


_PARTS = {kind: parts(norm=RMSNorm, mixer=kind) for kind in (Mamba, BiMamba)}


class MambaBlock(Fusable):
    """Pre-norm block: ``residual += hidden; hidden = mixer(norm(residual))``.

    An RMSNorm is computed in one op with the mixer where both may be fused (see
    :class:`mmvim.layers.fusion.Fusable`).

    Args:
        d_model (int): Channels.
        bidirectional (str, optional): None for :class:`Mamba`, 'v1' or 'v2' for
            :class:`BiMamba`. Defaults to None.
        norm (str): 'RMSNorm' or 'LayerNorm'. Defaults to 'RMSNorm'.
        norm_eps (float): Epsilon of the norms. Defaults to 1e-5.
        residual_in_fp32 (bool): Whether the residual stream is float32. Defaults to True.
        drop_path (float): Rate of ``self.drop_path``, which the owner of the block applies to the
            incoming hidden state. Defaults to 0.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.
        **mixer: Further arguments of the mixer.
    """

    def __init__(
        self,
        d_model: int,
        bidirectional: str | None = None,
        norm: str = 'RMSNorm',
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        drop_path: float = 0.0,
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer: object,
    ) -> None:
        super().__init__()
        check_choice('bidirectional', bidirectional, (None, 'v1', 'v2'))
        factory = {'device': device, 'dtype': dtype}
        self.norm = build_norm(norm, d_model, norm_eps, residual_in_fp32, ops_backend, **factory)
        self.drop_path = DropPath(drop_path)
        mixer.update(ops_backend=ops_backend, **factory)
        if bidirectional is None:
            self.mixer = Mamba(d_model, **mixer)
        else:
            self.mixer = BiMamba(d_model, bimamba=bidirectional, **mixer)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        seq_idx: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add, norm and mix.

        Args:
            hidden (Tensor): (batch, length, d_model), the output of the previous block.
            residual (Tensor, optional): (batch, length, d_model), the stream so far. None before
                the first block.
            seq_idx (Tensor, optional): (batch, length) int32, the number of each token's sequence
                where a row holds several.
            keep (Tensor, optional): (batch, 1, 1), factors of ``hidden`` that are still to be
                applied, from :meth:`DropPath.factors`. Defaults to None: none.

        Returns:
            tuple: The mixer's output and the stream, both (batch, length, d_model).
        """
        if seq_idx is None and self._may_fuse(hidden):
            norm = self._modules['norm']
            return self._modules['mixer']._fused(
                hidden,
                AddNorm(
                    norm._parameters['weight'],
                    residual,
                    None if keep is None else keep.view(-1),
                    norm.eps,
                    norm.residual_in_fp32,
                ),
            )
        if keep is not None:
            hidden = hidden * keep
        hidden, residual = self.norm(hidden, residual, return_residual=True)
        return self.mixer(hidden, **packed(seq_idx)), residual

    @property
    def _fused_parts(self) -> Parts:
        # Of any other mixer, parts that it is not.
        return _PARTS.get(type(self._modules['mixer']), _PARTS[Mamba])

    def _may_fuse(self, x: Tensor) -> bool:
        """Whether norm and mixer may be one op; x is checked as they would."""
        modules = self._modules
        norm, mixer = modules['norm'], modules['mixer']
        if type(norm) is not RMSNorm or x.dim() != 3 or x.shape[-1] != norm.dim:
            return False
        return (
            self._is_plain()
            and norm.dim == mixer.d_model
            and serves(norm.ops_backend, x)
            and mixer._may_fuse(x)
        )


_FORWARD = MambaBlock.forward


class _Call:
    """Blocks that are one call of an op as long as they stay what they are."""

    def __init__(self, blocks: list[MambaBlock], options: tuple) -> None:
        self.blocks = blocks
        self.options = options
        self.backends = {blocks[0].norm.ops_backend, blocks[0].mixer.ops_backend}
        self.dim = blocks[0].norm.dim
        self.keep = tuple(
            1 - b.drop_path.drop_prob if b.drop_path.training else 1.0 for b in blocks[1:]
        )
        self.parameters = tuple(
            p for b in blocks for p in (*b.mixer._arguments()[0], b.norm._parameters['weight'])
        )
        self.snapshot = Snapshot(m for b in blocks for m in b.modules())

    @classmethod
    def of(cls, blocks: list[nn.Module], x: Tensor) -> '_Call | None':
        """The call for ``x`` and tensors like it, or None if the blocks have to be called."""
        if not all(_is_one_op(block, x) for block in blocks):
            return None
        options = {_options(block) for block in blocks}
        return cls(blocks, options.pop()) if len(options) == 1 else None

    def serves(self, x: Tensor) -> bool:
        return (
            x.dim() == 3
            and x.shape[-1] == self.dim
            and not (is_intercepted() or torch.jit.is_tracing() or is_exporting())
            and not calls_are_watched()
            and all(serves(backend, x) for backend in self.backends)
        )

    def run(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        keep = factors_of(self.keep, x)
        return mixer_stack(x, self.parameters, residual, keep, self.options[0])


# By the list that the blocks are in, and by the first and last of them.
_calls: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], _Call]]
_calls = weakref.WeakKeyDictionary()


def _is_one_op(block: nn.Module, x: Tensor) -> bool:
    """Whether the block, called for ``x``, would be one call of the op and nothing besides."""
    return (
        type(block) is MambaBlock
        and MambaBlock.forward is _FORWARD
        and 'forward' not in vars(block)
        and not is_hooked(block)
        and block._may_fuse(x)
        and is_plain_drop_path(block.drop_path)
        and block.mixer.gamma is None
    )


def _options(block: MambaBlock) -> tuple:
    """What blocks must have in common to be one call; the op's arguments come first."""
    norm, mixer = block.norm, block.mixer
    _, kind, reverse, scale = mixer._arguments()
    arguments = (
        kind,
        reverse,
        scale,
        mixer._bias_scale,
        mixer.discretization,
        mixer.recompute,
        norm.eps,
        norm.residual_in_fp32,
    )
    return arguments, norm.dim, norm.ops_backend, mixer.ops_backend


def run_blocks(
    layers: nn.ModuleList,
    first: int,
    last: int,
    hidden: Tensor,
    residual: Tensor | None,
    seq_idx: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the blocks from ``first`` to ``last``, with stochastic depth between them.

    They are one call of an op where each of them would be one, with the same options.

    Args:
        layers (nn.ModuleList): Blocks, or modules that stand for them.
        first (int): Index of the first block.
        last (int): Index of the last one.
        hidden (Tensor): (batch, length, d_model), what is added to the stream first.
        residual (Tensor, optional): (batch, length, d_model), the stream; None for none yet.
        seq_idx (Tensor, optional): As for :class:`MambaBlock`.
        recompute (bool): Whether to rerun each block in the backward pass instead of keeping its
            intermediates. Defaults to False.

    Returns:
        tuple: The output of the last block, not dropped, and the stream, both
        (batch, length, d_model).
    """
    blocks = list(layers._modules.values())[first : last + 1]
    if seq_idx is None and not recompute and not torch.compiler.is_compiling():
        call = _call_of(layers, first, last, blocks, hidden)
        if call is not None:
            return call.run(hidden, residual)
    factors = drawn_together([block.drop_path for block in blocks[1:]], hidden)
    for i, block in enumerate(blocks):
        keep = None
        if i and factors is not None:
            keep = factors[i - 1].view(-1, 1, 1)
        elif i:
            hidden, keep = deferred(block.drop_path, hidden)
        if keep is not None and not isinstance(block, MambaBlock):
            hidden, keep = hidden * keep, None
        given = (hidden, residual)
        if seq_idx is not None or keep is not None:
            given = (*given, seq_idx, keep)
        hidden, residual = recomputed(block, *given) if recompute else block(*given)
    return hidden, residual


def _call_of(
    layers: nn.ModuleList, first: int, last: int, blocks: list[nn.Module], x: Tensor
) -> _Call | None:
    if x.device.type not in STACK_DEVICES:
        return None
    calls = _calls.setdefault(layers, {})
    call = calls.get((first, last))
    if call is None or call.blocks != blocks or not call.snapshot.holds():
        # Others would keep what is no longer there.
        present = list(layers._modules.values())
        for (start, end), other in list(calls.items()):
            if other.blocks != present[start : end + 1] or not other.snapshot.holds():
                calls.pop((start, end), None)
        call = _Call.of(blocks, x)
        if call is None:
            return None
        calls[first, last] = call
    return call if call.serves(x) else None


class MambaStack(nn.Module):
    """Pre-norm stack of Mamba mixers over (batch, length, d_model).

    Args:
        d_model (int): Channels.
        n_layers (int): Number of layers.
        d_state (int): States per channel. Defaults to 16.
        d_conv (int): Convolution width. Defaults to 4.
        expand (int | float): Inner expansion. Defaults to 2.
        bidirectional (str, optional): None, 'v1' or 'v2' (see :class:`BiMamba`). Only None has
            states. Defaults to None.
        norm (str): 'RMSNorm' or 'LayerNorm'. Defaults to 'RMSNorm'.
        norm_eps (float): Epsilon of the norms. Defaults to 1e-5.
        residual_in_fp32 (bool): Whether the residual stream is float32. Defaults to True.
        drop_path_rate (float): Largest stochastic-depth rate. Defaults to 0.
        discretization (str): One of :data:`mmvim.ops.DISCRETIZATIONS`. Defaults to 'zoh'.
        ops_backend (str): 'auto', 'compiled' or 'torch'. Defaults to 'auto'.
        **mixer: Further arguments of the mixer, such as ``dt_rank`` or ``layer_scale``.

    Raises:
        TypeError: If a mixer argument is unknown.
        ValueError: If an argument is invalid.

    Example:
        >>> stack = MambaStack(d_model=64, n_layers=4)
        >>> y = stack(torch.randn(2, 100, 64))
        >>> state = stack.init_state(batch_size=2)
        >>> y0, state = stack.step(torch.randn(2, 64), state)
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int = 6,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        bidirectional: str | None = None,
        norm: str = 'RMSNorm',
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        drop_path_rate: float = 0.0,
        discretization: str = 'zoh',
        ops_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer: object,
    ) -> None:
        super().__init__()
        check_positive(n_layers=n_layers)
        rates = drop_path_rates(drop_path_rate, n_layers)
        shared = {
            'norm': norm,
            'norm_eps': norm_eps,
            'residual_in_fp32': residual_in_fp32,
            'ops_backend': ops_backend,
            'device': device,
            'dtype': dtype,
        }
        self.layers = nn.ModuleList(
            MambaBlock(
                d_model,
                bidirectional=bidirectional,
                drop_path=rates[i],
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                discretization=discretization,
                **shared,
                **mixer,
            )
            for i in range(n_layers)
        )
        self.drop_path = DropPath(rates[-1])
        self.norm_f = build_norm(
            norm, d_model, norm_eps, residual_in_fp32, ops_backend, device=device, dtype=dtype
        )
        self.bidirectional = bidirectional

    def _require_states(self) -> None:
        if self.bidirectional is not None:
            raise ValueError(
                f'a stack with bidirectional={self.bidirectional!r} has no states: its backward '
                'branch needs the whole sequence'
            )

    def init_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[MambaState]:
        """Return the states of all layers before the first token (see :meth:`Mamba.init_state`)."""
        self._require_states()
        return [layer.mixer.init_state(batch_size, device, dtype) for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        state: list[MambaState] | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[MambaState]]:
        """Run the stack.

        Args:
            x (Tensor): (batch, length, d_model).
            state (list[MambaState], optional): One per layer; never modified. Defaults to the
                states before the first token.
            return_state (bool): Whether to return the new states as well. Defaults to False.
            seq_idx (Tensor, optional): (batch, length) int32, the number of each token's sequence
                where a row holds several; states are then those of the first and the last.

        Returns:
            Tensor or tuple: (batch, length, d_model), and the states with ``return_state``.

        Raises:
            ValueError: If states are used with a bidirectional stack, or their number is wrong.
        """
        streaming = state is not None or return_state
        if streaming:
            self._require_states()
            if state is not None and len(state) != len(self.layers):
                raise ValueError(f'{len(state)} states were given to {len(self.layers)} layers')
        hidden, residual, new_state = x, None, []
        if not streaming:
            hidden = self.layers[0].drop_path(x)
            hidden, residual = run_blocks(
                self.layers, 0, len(self.layers) - 1, hidden, None, seq_idx
            )
        for i, layer in enumerate(self.layers if streaming else ()):
            hidden = layer.drop_path(hidden)
            hidden, residual = layer.norm(hidden, residual, return_residual=True)
            hidden, layer_state = layer.mixer(
                hidden, None if state is None else state[i], return_state=True, **packed(seq_idx)
            )
            new_state.append(layer_state)
        out = self.norm_f(self.drop_path(hidden), residual)
        return (out, new_state) if return_state else out

    def step(self, x: Tensor, state: list[MambaState]) -> tuple[Tensor, list[MambaState]]:
        """Process one token (batch, d_model); returns its output and the new states."""
        out, state = self.forward(x.unsqueeze(1), state, return_state=True)
        return out.squeeze(1), state
