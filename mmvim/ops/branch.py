"""The residual branch of a block as one op for each pass: ``x + keep * gamma * body(norm(x))``.

The norm is a layer norm and the body attention, an MLP, MambaVision's mixer or SS2D. Like
:func:`mmvim.ops.mixer.mixer` the op exists only as compiled code (csrc/mixers) and computes the
same as the modules do step by step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import define_compiled
from .mixer import Parameters
from .selective_scan import default_checkpoint_interval


class Body(NamedTuple):
    """What a branch computes after its norm.

    Attributes:
        kind: 'attention', 'mlp', 'mixer' or 'ss2d'.
        parameters: Weight and bias of the two linear layers: of attention those that make queries,
            keys and values, and the output. Those of a mixer are described in
            :func:`mmvim.ops.mixer.mixer` (its kind is 'half'). Those of SS2D: weights and biases of
            the first layer, the convolution, the projection (no bias) and the step sizes, A_log, D,
            weights and biases of the norm behind the scans and the last layer.
        heads: Of attention.
        bias_scale: Of a mixer, as the following ones.
        discretization: As for the mixer.
        recompute: As for the mixer; of an MLP whether what lies between its layers is not kept.
        gelu_in_product: Of an MLP, whether the matrix product makes the GELU, by the tanh formula;
            on GPUs, of 16 bits, and without gradients.
        routes: Of SS2D, as numbers, as :func:`mmvim.ops.cross_scan` names them.
        round_steps: Of SS2D, those of the kernels of all routes.
        inner_eps: Of the norm behind the scans of SS2D.
    """

    kind: str
    parameters: Parameters
    heads: int = 0
    bias_scale: float = 1.0
    discretization: str = 'zoh'
    recompute: bool | None = None
    gelu_in_product: bool = False
    routes: Sequence[int] = ()
    round_steps: int = 0
    inner_eps: float = 0.0


def branch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    body: Body,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Add a branch to ``x``.

    Parameters may have any floating dtype.

    Args:
        x: (batch, ..., c); the axes between are one sequence. For SS2D (batch, height, width, c).
        norm_weight: (c,), of the layer norm.
        norm_bias: (c,), of the layer norm.
        eps: Of the layer norm.
        body: What comes after the norm.
        dtype: Of the branch between the norm, whose arithmetic is that of add_rms_norm, and gamma:
            that of autocast, or of x.
        gamma: (c,), factors of its result. None: 1.
        keep: (batch, 1, ..., 1), factors of the samples (stochastic depth). None: 1.

    Returns:
        Like x, in the dtype to which x, the branch and gamma are promoted.
    """
    kind, parameters, heads, bias_scale, discretization, recompute, *options = body
    return torch.ops.mmvim.branch.default(
        x,
        keep,
        (norm_weight, norm_bias, gamma, *parameters),
        kind,
        dtype,
        heads,
        eps,
        bias_scale,
        discretization,
        x.is_cuda if recompute is None else recompute,
        *options,
        default_checkpoint_interval(x),
    )


def ss2d_blocks(
    x: Tensor, parameters: Parameters, eps: float, dtype: torch.dtype, scan: Body, mlp: Body | None
) -> Tensor:
    """Add the branches of blocks of SS2D and, if there is one, an MLP, without gradients.

    The same as calls of :func:`branch` one after the other, but each sum is made by the norm behind
    it.

    Args:
        x: (batch, height, width, c).
        parameters: Of each block weight and bias of the first norm, the parameters of SS2D, weight
            and bias of the second norm, the parameters of the MLP.
        eps: Of the norms.
        dtype: Of the branches.
        scan: The options of SS2D.
        mlp: Those of the MLP.

    Returns:
        Like x, in the dtype to which x and the branches are promoted.
    """
    return torch.ops.mmvim.ss2d_blocks.default(
        x,
        parameters,
        mlp is not None,
        dtype,
        eps,
        scan.discretization,
        mlp is not None and mlp.gelu_in_product,
        scan.routes,
        scan.round_steps,
        scan.inner_eps,
    )


def _fake(x, keep, parameters, kind, dtype, *_):
    gamma = parameters[2]
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, dtype))


define_compiled(
    'branch(Tensor x, Tensor? keep, Tensor?[] parameters, str kind, ScalarType dtype, int heads, '
    'float eps, float bias_scale, str discretization, bool recompute, '
    'bool gelu_in_product, int[] routes, int round_steps, float inner_eps, '
    'int checkpoint_interval) -> Tensor',
    _fake,
)
define_compiled(
    'ss2d_blocks(Tensor x, Tensor?[] parameters, bool mlp, ScalarType dtype, float eps, '
    'str discretization, bool gelu_in_product, int[] routes, int round_steps, float inner_eps) '
    '-> Tensor',
    lambda x, _, mlp, dtype, *options: x.new_empty(
        x.shape, dtype=torch.promote_types(x.dtype, dtype)
    ),
)
