"""The loop over the steps of a scan as one operator, for exports to ONNX.

``torch.export`` traces the body of PyTorch's ``scan`` operator several times for each scan, and the
ONNX exporter decomposes it again: minutes for a model of 24 layers with two directions each. Here
the whole loop is one opaque operator to both and finally becomes ONNX's ``Scan``, whose body is
written once.
"""

from typing import Any

import torch
from torch import Tensor

_NAMESPACE = 'mmvim_export'
_LIBRARY = torch.library.Library(_NAMESPACE, 'DEF')
_LIBRARY.define(
    'loop_zoh(Tensor start, Tensor delta, Tensor drive, Tensor A, Tensor B, Tensor C, '
    'bool reverse) -> Tensor'
)
_LIBRARY.define(
    'loop_general(Tensor start, Tensor a, Tensor drive, Tensor C, bool reverse) -> Tensor'
)


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


@torch.library.impl(_LIBRARY, 'loop_zoh', 'CompositeExplicitAutograd')
def _loop_zoh(
    start: Tensor,
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reverse: bool,
) -> Tensor:
    out, h = torch.empty_like(delta), start
    for t in _order(len(delta), reverse):
        h = torch.exp(delta[t].unsqueeze(-1) * A) * h
        h = h + drive[t].unsqueeze(-1) * B[t].unsqueeze(-2)
        out[t] = torch.matmul(h, C[t].unsqueeze(-1)).squeeze(-1)
    return out


@torch.library.impl(_LIBRARY, 'loop_general', 'CompositeExplicitAutograd')
def _loop_general(start: Tensor, a: Tensor, drive: Tensor, C: Tensor, reverse: bool) -> Tensor:
    out, h = torch.empty_like(drive[..., 0]), start
    for t in _order(len(drive), reverse):
        h = a[t] * h + drive[t]
        out[t] = torch.matmul(h, C[t].unsqueeze(-1)).squeeze(-1)
    return out


@torch.library.register_fake(f'{_NAMESPACE}::loop_zoh', lib=_LIBRARY)
def _(start, delta, drive, A, B, C, reverse):
    return delta.new_empty(delta.shape)


@torch.library.register_fake(f'{_NAMESPACE}::loop_general', lib=_LIBRARY)
def _(start, a, drive, C, reverse):
    return drive.new_empty(drive.shape[:-1])


_OPS = getattr(torch.ops, _NAMESPACE)


def loop_zoh(
    delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> Tensor:
    """Loop over the first axis of delta, drive (l, ..., d) and B, C (l, ..., n): y (l, ..., d)."""
    start = delta.new_zeros((*delta.shape[1:], A.shape[-1]))
    return _OPS.loop_zoh(start, delta, drive, A, B, C, reverse)


def loop_general(a: Tensor, drive: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """The same with precomputed coefficients: a, drive (l, ..., d, n)."""
    return _OPS.loop_general(drive.new_zeros(drive.shape[1:]), a, drive, C, reverse)


def is_available() -> bool:
    """Whether the exporter of this PyTorch accepts translations of operators."""
    try:
        from torch.onnx._internal.exporter import _core
    except ImportError:
        return False
    return hasattr(_core, 'current_tracer')


class _Body:
    """Builder of a Scan's body, whose inputs are the state and one step of each tensor."""

    def __init__(self, start: Any, iterated: tuple) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.nodes: list = []
        kinds = [(start, start.shape), *((x, ir.Shape(x.shape[1:])) for x in iterated)]
        self.inputs = [
            ir.Value(name=f'{x.name}_step', shape=shape, type=ir.TensorType(x.dtype))
            for x, shape in kinds
        ]
        self.prefix = f'{start.name}_{iterated[0].name}'

    def __call__(self, kind: str, *inputs: Any) -> Any:
        node = self.ir.Node('', kind, inputs, num_outputs=1)
        node.outputs[0].name = f'{self.prefix}_{len(self.nodes)}'
        self.nodes.append(node)
        return node.outputs[0]

    def axis(self, place: int) -> Any:
        """The axes argument of (un)squeeze."""
        tensor = self.ir.tensor([place], name=f'{self.prefix}_axis_{len(self.nodes)}')
        attributes = self.ir.convenience.convert_attributes({'value': tensor})
        node = self.ir.Node('', 'Constant', [], attributes)
        node.outputs[0].name = tensor.name
        self.nodes.append(node)
        return node.outputs[0]

    def finish(self, h: Any, C: Any) -> tuple:
        """The new state and the step's output."""
        column = self('Unsqueeze', C, self.axis(-1))
        y = self('Squeeze', self('MatMul', h, column), self.axis(-1))
        for value in (h, y):
            value.dtype = self.inputs[0].dtype
        h.shape = self.inputs[0].shape
        return h, y


def _scan(body: _Body, start: Any, iterated: tuple, outputs: tuple, reverse: bool) -> Any:
    from torch.onnx._internal.exporter import _core

    ir, tracer = body.ir, _core.current_tracer
    graph = ir.Graph(body.inputs, outputs, nodes=body.nodes, name=f'{body.prefix}_body')
    attributes = ir.convenience.convert_attributes(
        {
            'body': graph,
            'num_scan_inputs': len(iterated),
            'scan_input_directions': [int(reverse)] * len(iterated),
            'scan_output_directions': [int(reverse)],
        }
    )
    node = ir.Node(
        '', 'Scan', [start, *iterated], attributes, num_outputs=2, version=tracer.opset.version
    )
    tracer.nodes.append(node)
    return node.outputs[1]


def _translate_zoh(start, delta, drive, A, B, C, reverse=False):
    iterated = (delta, drive, B, C)
    body = _Body(start, iterated)
    h, delta_t, drive_t, B_t, C_t = body.inputs
    decay = body('Exp', body('Mul', body('Unsqueeze', delta_t, body.axis(-1)), A))
    new = body(
        'Mul',
        body('Unsqueeze', drive_t, body.axis(-1)),
        body('Unsqueeze', B_t, body.axis(-2)),
    )
    h = body('Add', body('Mul', decay, h), new)
    return _scan(body, start, iterated, body.finish(h, C_t), reverse)


def _translate_general(start, a, drive, C, reverse=False):
    iterated = (a, drive, C)
    body = _Body(start, iterated)
    h, a_t, drive_t, C_t = body.inputs
    h = body('Add', body('Mul', a_t, h), drive_t)
    return _scan(body, start, iterated, body.finish(h, C_t), reverse)


def translations() -> dict:
    """The ``custom_translation_table`` for ``torch.onnx.export``."""
    return {
        _OPS.loop_zoh.default: _translate_zoh,
        _OPS.loop_general.default: _translate_general,
    }
