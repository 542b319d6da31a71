"""Parameters and arithmetic of a model, including mmvim's ops.

Two conventions are reported side by side:

* ``macs``, which papers and OpenMMLab call FLOPs: multiply-accumulates of matrix products,
  convolutions (including the short ones along the sequence) and attention, and three for each
  token, channel, state and direction of a scan (one each for the decay of the state, the input's
  share and the output). Norms count as nothing.
* ``flops``: additions and multiplications. A multiply-accumulate is two; a scan takes nine for each
  token, channel, state and direction, as users of mamba-ssm count
  (https://github.com/state-spaces/mamba/issues/110), and two more for each token and channel with a
  skip connection or a gate; norms five to seven for each value.

A scan that makes its step sizes of their low rank includes that matrix product.

Neither counts other elementwise arithmetic (activations, additions of branches).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmvim.ops.layer_norm  # noqa: F401  defines the ops

_aten = torch.ops.aten
SCAN_MACS = 3
SCAN_FLOPS = 9

Cost = tuple[str, int, int]


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _scan(u: Tensor, states: int, has_skip: bool, has_gate: bool) -> Cost:
    steps = _size(u.shape)
    flops = SCAN_FLOPS * steps * states + 2 * steps * (has_skip + has_gate)
    return 'scan', SCAN_MACS * steps * states, flops


def _selective_scan(args: Sequence[Any], out: Any) -> Cost:
    u, _, A, _, _, D, z = args[:7]
    return _scan(u, A.shape[1], D is not None, z is not None)


def _bidirectional_scan(args: Sequence[Any], out: Any) -> Cost:
    _, macs, flops = _scan(args[0], args[2].shape[1], args[5] is not None, False)
    gate = 2 * _size(args[0].shape) * (args[14] is not None)
    return 'scan', 2 * macs, 2 * flops + gate


def _cross_scan(args: Sequence[Any], out: Any) -> Cost:
    x, _, weight, A, _, _, D, _, routes = args[:9]
    _, macs, flops = _scan(x, A.shape[2], D is not None, False)
    if weight is not None:  # the projection to step sizes, a matrix product of each route
        projection = _size(x.shape) * weight.shape[2]
        macs, flops = macs + projection, flops + 2 * projection
    return 'scan', len(routes) * macs, len(routes) * flops


def _conv1d(directions: int) -> Callable[[Sequence[Any], Any], Cost]:
    def cost(args: Sequence[Any], out: Any) -> Cost:
        macs = directions * _size(args[0].shape) * args[1].shape[1]
        return 'conv1d', macs, 2 * macs

    return cost


def _norm(flops_per_value: int) -> Callable[[Sequence[Any], Any], Cost]:
    def cost(args: Sequence[Any], out: Any) -> Cost:
        return 'norm', 0, flops_per_value * _size(args[0].shape)

    return cost


def _attention(args: Sequence[Any], out: Any) -> Cost:
    (*batch, queries, channels), keys = args[0].shape, args[1].shape[-2]
    macs = _size(batch) * queries * keys * (channels + args[2].shape[-1])
    return 'attention', macs, 2 * macs


_FORMULAS = {
    'selective_scan': _selective_scan,
    'bidirectional_scan': _bidirectional_scan,
    'cross_scan': _cross_scan,
    'causal_conv1d': _conv1d(1),
    'bidirectional_conv1d': _conv1d(2),
    # One addition, a square and its sum, and two products.
    'add_rms_norm': _norm(5),
}
_COSTS: dict[Any, Callable[[Sequence[Any], Any], Cost]] = {
    getattr(getattr(torch.ops, namespace), name): formula
    for namespace in ('mmvim', 'mmvim_torch')
    for name, formula in _FORMULAS.items()
}
_COSTS[_aten.native_layer_norm] = _norm(7)
_COSTS[torch.ops.mmvim.layer_norm] = _norm(7)
_COSTS[_aten._native_batch_norm_legit_no_training] = _norm(4)
_COSTS[_aten.native_batch_norm] = _norm(7)
_COSTS[_aten.native_group_norm] = _norm(7)
# PyTorch's counter knows the GPU variants.
_COSTS[_aten._scaled_dot_product_flash_attention_for_cpu] = _attention

_KINDS = {
    'convolution': 'conv',
    '_convolution': 'conv',
    'mm': 'matmul',
    'addmm': 'matmul',
    'bmm': 'matmul',
    'baddbmm': 'matmul',
}


class _Counter(FlopCounterMode):
    """PyTorch's counter of matrix products, together with ours."""

    def __init__(self) -> None:
        self.macs: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        mapping = {op: self._formula(cost) for op, cost in _COSTS.items()}
        super().__init__(display=False, custom_mapping=mapping)

    def _formula(self, cost: Callable[[Sequence[Any], Any], Cost]) -> Callable[..., int]:
        def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            kind, macs, flops = cost(args, out_val)
            self.macs[kind] += macs
            self.flops[kind] += flops
            return 0

        formula._get_raw = True
        return formula

    def by_kind(self) -> dict[str, dict[str, int]]:
        """MACs and FLOPs of each kind of arithmetic."""
        for op, flops in self.get_flop_counts().get('Global', {}).items():
            name = str(op).rpartition('.')[2]
            kind = _KINDS.get(name, 'attention' if 'attention' in name else 'matmul')
            self.flops[kind] += flops
            self.macs[kind] += flops // 2
        return {
            kind: {'macs': self.macs[kind], 'flops': self.flops[kind]}
            for kind in sorted(self.flops, key=lambda kind: -self.flops[kind])
            if self.flops[kind]
        }


def count(model: nn.Module, *inputs: Any, forward: Callable | None = None) -> dict[str, Any]:
    """Count the parameters of a model and the arithmetic of one forward pass.

    Args:
        model: Any module. On the ``meta`` device nothing is computed.
        *inputs: Inputs of the forward pass.
        forward: Function to call with the inputs. Defaults to None: ``model``.

    Returns:
        ``parameters``, ``macs``, ``flops`` and ``by_kind``, which has ``macs`` and ``flops`` of
        'matmul', 'conv', 'attention', 'scan', 'conv1d' and 'norm'.
    """
    counter = _Counter()
    with torch.no_grad(), counter:
        (forward or model)(*inputs)
    kinds = counter.by_kind()
    return {
        'parameters': sum(p.numel() for p in model.parameters()),
        'macs': sum(kind['macs'] for kind in kinds.values()),
        'flops': sum(kind['flops'] for kind in kinds.values()),
        'by_kind': kinds,
    }


def count_config(
    cfg: Any,
    size: tuple[int, int] | None = None,
    *,
    frames: int | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Count the model of a config for one input.

    Classifiers and segmentors are counted without computing anything. Detectors run on random
    pixels on the CPU, because their second stage depends on values; only what ``mode='tensor'``
    runs is counted, which excludes non-maximum suppression.

    Args:
        cfg: A config, path or name, as for :func:`mmvim.get_model`.
        size: Height and width of the input. Defaults to None: the model's own.
        frames: Number of frames of a video. Defaults to None: the model's own; without, an image.
        channels: Channels of the input. Defaults to None: the model's.

    Returns:
        As :func:`count`, and ``input``, the shape without the batch.
    """
    from mmvim.apis.inputs import input_shape
    from mmvim.apis.model_zoo import build_model, load_config

    cfg = load_config(cfg)
    values_matter = cfg.get('default_scope') == 'mmdet'
    device = torch.device('cpu' if values_matter else 'meta')
    with device:
        model = build_model(cfg)
    model.to(device).eval()  # also tells the data preprocessor
    own, *rest = input_shape(cfg, model, size=size, frames=frames)
    shape = (channels or own, *rest)
    image = torch.rand(1, *shape) if values_matter else torch.empty(1, *shape, device=device)
    inputs = (image, [_empty_sample(shape[-2:])]) if values_matter else (image,)
    report = count(model, *inputs, forward=lambda *args: model(*args, mode='tensor'))
    return {'input': shape, **report}


def _empty_sample(size: tuple[int, int]) -> Any:
    from mmdet.structures import DetDataSample

    shape = tuple(size)
    return DetDataSample(
        metainfo=dict(
            img_shape=shape,
            ori_shape=shape,
            pad_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1.0, 1.0),
        )
    )
