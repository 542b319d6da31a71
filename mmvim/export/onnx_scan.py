"""The scan in ONNX: chunks of unrolled steps, without ``Loop``, ``Scan`` or ``If``.

While PyTorch exports a model, a scan is one opaque operator, which costs neither ``torch.export``
nor the ONNX exporter time; :func:`expand` then replaces it by standard operators.

A sequence of l steps is cut into K chunks of T steps, T at most :data:`MAX_STEPS`. The steps of a
chunk are unrolled, and each operator works on one step of all chunks. First every chunk runs from
zero; its last state and its decay, the product of its steps' decays, make a sequence of K elements
of the same recurrence, which yields the state before each chunk. Then every chunk runs again
from there. Only decays in [-1, 1] are multiplied, and nothing is divided by them, so nothing
overflows. The decays and drives of all steps are kept: 2 l d n values a sequence.

K elements are unrolled if they are few and otherwise cut into chunks themselves. If l is not known
at export, the K elements are cut into chunks once more, and the rest is done by :data:`DOUBLINGS`
doublings (Hillis and Steele, *Data parallel algorithms*, 1986): :data:`MAX_DYNAMIC_LENGTH` steps in
all. A longer sequence is an error when the file runs.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvim.ops import TWO_TAP, backend_info

MIN_STEPS, MAX_STEPS = 8, 16
"""Steps of a chunk; a sequence's number is the one that needs the least padding."""
MAX_CHUNKS = 32
"""Most elements that are unrolled one by one."""
DOUBLINGS = 8
"""Doublings of the last sequence of unknown length."""
MAX_DYNAMIC_LENGTH = MAX_STEPS**2 * 2**DOUBLINGS
"""Longest sequence in a file for images of any size."""
DOMAIN = 'mmvim'
OPERATOR = 'selective_scan'
"""The operator that files with custom operators keep."""

_END = torch.iinfo(torch.int64).max


def scan_zoh(
    delta: Tensor,
    drive: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The scan of 'zoh' over the second axis, as an opaque operator of an export.

    Args:
        delta: (b, l, ..., d).
        drive: (b, l, ..., d), Δu.
        A: (..., n, d).
        B: (b, l, ..., n).
        C: (b, l, ..., n).
        start: State before the first step (b, ..., n, d), or None for zero.
        reverse: Whether the last step comes first.

    Returns:
        y (b, l, ..., d) and the last state (b, ..., n, d).
    """
    return _opaque('ScanZoh', (delta, drive, A, B, C, start), C, delta.shape[-1], reverse)


def scan_general(
    a: Tensor, drive: Tensor, C: Tensor, start: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The same with precomputed decays and drives: a, drive (b, l, ..., n, d)."""
    return _opaque('ScanGeneral', (a, drive, C, start), C, a.shape[-1], reverse)


def custom_scan(
    inputs: tuple[Tensor | None, ...], delta_softplus: bool, discretization: str, reverse: bool
) -> tuple[Tensor, Tensor]:
    """A scan by the operator of :func:`custom_library`, which stays in the graph.

    Args:
        inputs: u, delta, A, B, C, D, delta_bias, initial_state and seq_idx of
            :func:`mmvim.ops.selective_scan`; float32, and int32 for the last. All but the first
            five may be None.
        delta_softplus: As for that op.
        discretization: As for that op.
        reverse: As for that op.

    Returns:
        y (b, l, d), without gate, and the last state.
    """
    u, A = inputs[0], inputs[2]
    channels, states = A.shape
    parts = 2 if discretization in TWO_TAP else 1
    return torch.onnx.ops.symbolic_multi_out(
        f'{DOMAIN}::{OPERATOR}',
        inputs,
        {
            'delta_softplus': int(delta_softplus),
            'discretization': discretization,
            'reverse': int(reverse),
        },
        dtypes=(torch.float32, torch.float32),
        shapes=(tuple(u.shape), (u.shape[0], channels, parts * states)),
        version=1,
    )


def custom_library() -> Path:
    """The shared library with the operator, for ``SessionOptions.register_custom_ops_library``.

    It needs onnxruntime 1.17 or later, and neither mmvim nor torch: it may be copied.

    Raises:
        RuntimeError: mmvim's kernels are not compiled, with the reason.
    """
    info = backend_info()
    if not info['loaded']:
        raise RuntimeError(f"onnxruntime's operator is part of the kernels, but {info['reason']}")
    path = Path(info['library']).with_name('_onnx.dll' if os.name == 'nt' else '_onnx.so')
    if not path.is_file():
        raise RuntimeError(f'{path} is missing: build the kernels again (python csrc/build.py)')
    return path


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), for which onnxruntime's own operator takes five times as long."""
    return torch.onnx.ops.symbolic(
        f'{DOMAIN}::FastSoftplus', (x,), dtype=torch.float32, shape=x.shape, version=1
    )


def _opaque(
    kind: str, inputs: tuple[Tensor | None, ...], C: Tensor, channels: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    batch, length, *groups, states = C.shape
    attributes = {
        'reverse': int(reverse),
        'length': length if isinstance(length, int) else 0,
        'groups': [1, *groups][-1],
        'states': states,
        'channels': channels,
    }
    return torch.onnx.ops.symbolic_multi_out(
        f'{DOMAIN}::{kind}',
        inputs,
        attributes,
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, length, *groups, channels), (batch, *groups, states, channels)),
        version=1,
    )


def expand(model: Any) -> Any:
    """Replace the opaque scans of an ``onnx.ModelProto`` by standard operators.

    Returns:
        The new model; ``model`` is modified.
    """
    import onnx.inliner

    functions = {}
    # The inliner wants one version of the operators everywhere; 18 to 24 agree on those used here.
    opsets = [entry for entry in model.opset_import if not entry.domain]
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type == OPERATOR:
            continue
        kind, count = node.op_type, _WRITERS[node.op_type][1]
        has_start = len(node.input) > count and bool(node.input[count])
        options = {x.name: x.i for x in node.attribute}
        name = '_'.join(map(str, (kind, has_start, *options.values())))
        if name not in functions:
            functions[name] = _function(name, kind, has_start, options, opsets)
        node.op_type = name
        del node.attribute[:], node.input[count + has_start :]
    if functions:
        model.functions.extend(functions.values())
        model = onnx.inliner.inline_local_functions(model)
    if all(node.domain != DOMAIN for node in model.graph.node):
        for entry in [x for x in model.opset_import if x.domain == DOMAIN]:
            model.opset_import.remove(entry)
    return model


def _function(name: str, kind: str, has_start: bool, options: dict[str, int], opsets: list) -> Any:
    from onnx import helper

    write, count = _WRITERS[kind]
    inputs = [f'input_{i}' for i in range(count + has_start)]
    op = _Operators()
    start = op.Unsqueeze(inputs[count], [1, 2]) if has_start else None
    outputs = write(op, options, *inputs[:count], start)
    return helper.make_function(DOMAIN, name, inputs, outputs, op.nodes, opsets)


class _Operators:
    """ONNX operators as functions of names of tensors, which write their nodes down.

    A list of integers or a float among the inputs stands for a constant. The attribute ``outputs``
    is the number of outputs, and makes the result a list.
    """

    def __init__(self) -> None:
        self.nodes: list = []
        self._constants: dict = {}

    def __getattr__(self, kind: str) -> Any:
        return functools.partial(self._write, kind)

    def _write(self, kind: str, *inputs: Any, outputs: int = 0, **attributes: Any) -> Any:
        from onnx import helper

        inputs = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        names = [f'{kind}_{len(self.nodes)}_{i}' for i in range(max(outputs, 1))]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names if outputs else names[0]

    def _constant(self, value: list[int] | float) -> str:
        key = repr(value)
        if key not in self._constants:
            kind = {'value_float': value} if isinstance(value, float) else {'value_ints': value}
            self._constants[key] = self.Constant(**kind)
        return self._constants[key]


def _write_zoh(op, options, delta, drive, A, B, C, start):
    chunks = _Chunks(op, delta, **options)
    delta, drive = (chunks.split(x, chunks.row) for x in (delta, drive))
    B = chunks.split(B, chunks.column)
    a = [op.Exp(op.Mul(x, A)) for x in delta]
    v = [op.Mul(x, y) for x, y in zip(drive, B, strict=True)]
    # The decay of a chunk costs less from the sum of its Δ than as a product of decays.
    decay = op.Exp(op.Mul(functools.reduce(op.Add, delta), A))
    return chunks.outputs(a, v, decay, C, start)


def _write_softplus(op, options, x, start):
    e = op.Exp(op.Neg(op.Abs(x)))
    y = op.Add(e, 1.0)
    # log(1 + e) is off by what the sum has lost of e, over 1 + e.
    lost = op.Sub(e, op.Sub(y, 1.0))
    return [op.Add(op.Add(op.Log(y), op.Div(lost, y)), op.Relu(x))]


def _write_general(op, options, a, drive, C, start):
    chunks = _Chunks(op, a, **options)
    a, v = chunks.split(a, chunks.state, 1.0), chunks.split(drive, chunks.state)
    return chunks.outputs(a, v, functools.reduce(op.Mul, a), C, start)


_WRITERS = {
    'ScanZoh': (_write_zoh, 5),
    'ScanGeneral': (_write_general, 3),
    'FastSoftplus': (_write_softplus, 1),
}


class _Chunks:
    """A sequence (b, l, ...) as T tensors (b, K, 1, ...), one a step, in the order of the scan.

    Reshapes name every axis they can: onnxruntime reuses memory only between tensors that it knows
    to have the same shape.

    Args:
        op: ONNX operators.
        x: A tensor (b, l, ...).
        length: l, or 0 if it is not known.
        reverse: Direction of the scan.
        groups, states, channels: The other axes of a state.
        level: Number of sequences of which this one is the chunks.
    """

    def __init__(
        self,
        op: Any,
        x: Any,
        *,
        length: int,
        reverse: int,
        groups: int,
        states: int,
        channels: int,
        level: int = 0,
    ) -> None:
        self.op, self.length, self.reverse, self.level = op, length, reverse, level
        self.axes = dict(groups=groups, states=states, channels=channels)
        group = [groups] if groups > 1 else []
        self.state, self.row = [*group, states, channels], [*group, 1, channels]
        self.column, self.weights = [*group, states, 1], [*group, 1, states]
        self.output = [*group, channels]
        self.steps, self.count, self.missing = MAX_STEPS, 0, [0, 0]
        self.end = [length]
        if length:
            allowed = range(MIN_STEPS, MAX_STEPS + 1) if length > MAX_STEPS else [length]
            self.steps = min(allowed, key=lambda steps: (-length % steps, -steps))
            self.count = -(-length // self.steps)
            self.missing[1] = -length % self.steps
            return
        self.end = op.Shape(x, start=1, end=2)
        if level == 0:
            # Out of bounds for a sequence that is too long.
            index = op.Div(self.end, [MAX_DYNAMIC_LENGTH + 1])
            self.end = op.Add(self.end, op.Gather([0], index))
        missing = op.Mod(op.Neg(self.end), [self.steps])
        self.missing = op.Concat([0], missing, axis=0)

    def ordered(self, x: list) -> list:
        """From the order of memory to that of the scan, and back."""
        return x[::-1] if self.reverse else x

    def pieces(self, x: Any, axis: int, count: int) -> list:
        if count == 1:
            return [x]
        return self.ordered(self.op.Split(x, outputs=count, axis=axis, num_outputs=count))

    def split(self, x: Any, rest: list[int], filler: float = 0.0) -> list:
        """The steps of ``x``, each (b, K, 1, *rest), filled at the end of memory."""
        if self.missing != [0, 0]:
            x = self.op.Pad(x, self.missing, filler, [1])
        x = self.op.Reshape(x, [0, self.count or -1, self.steps, *rest])
        return self.pieces(x, 2, self.steps)

    def join(self, steps: list, rest: list[int]) -> Any:
        """The inverse of :meth:`split`."""
        op = self.op
        x = op.Concat(*self.ordered(steps), axis=2)
        x = op.Reshape(x, [0, self.count * self.steps or -1, *rest])
        return x if self.missing == [0, 0] else op.Slice(x, [0], self.end, [1])

    def outputs(self, a: list, v: list, decay: Any, C: Any, start: Any) -> tuple:
        """The sequence of the outputs C h, and the last state."""
        op = self.op
        C = self.split(C, self.weights)
        states = self.states(a, v, decay, start)[1:]
        # Last step first: onnxruntime walks back from the last node, which has it compute each
        # output right after its state, while that is in the cache.
        y = [op.MatMul(c, h) for c, h in zip(C[::-1], states[::-1], strict=True)]
        y = self.join(y[::-1], self.output)
        first, behind = (0, 1) if self.reverse else (-1, _END)
        end = op.Slice(states[-1], [first], [behind], [1])
        return y, op.Squeeze(end, [1, 2])

    def states(self, a: list, v: list, decay: Any, start: Any) -> list:
        """The states (b, K, 1, ...) before the first step and after each.

        Args:
            a: Decays of the steps.
            v: Drives of the steps.
            decay: Decay of the chunks.
            start: State before the first chunk (b, 1, 1, ...), or None for zero.
        """
        if self.count != 1:
            start = self.before_chunks(decay, self.run(a, v, None)[-1], start)
        return self.run(a, v, start)

    def run(self, a: list, v: list, h: Any) -> list:
        """The states from ``h`` on; None is zero."""
        states = [h]
        for decay, drive in zip(a, v, strict=True):
            h = drive if h is None else self.op.Add(self.op.Mul(decay, h), drive)
            states.append(h)
        return states

    def before_chunks(self, decay: Any, end: Any, start: Any) -> Any:
        """The state before each chunk, given those at their ends if they all began at zero."""
        op = self.op
        if 0 < self.count <= MAX_CHUNKS:
            a, v = (self.pieces(x, 1, self.count) for x in (decay, end))
            states = self.run(a[:-1], v[:-1], start)
            if start is not None:
                return op.Concat(*self.ordered(states), axis=1)
            states = op.Concat(*self.ordered(states[1:]), axis=1)
            return op.Pad(states, [0, 1] if self.reverse else [1, 0], 0.0, [1])
        if not self.count and self.level == 1:
            return self.double(decay, end, start)
        chunks = _Chunks(
            op, end, length=self.count, reverse=self.reverse, level=self.level + 1, **self.axes
        )
        a, v = chunks.split(decay, self.state, 1.0), chunks.split(end, self.state)
        states = chunks.states(a, v, functools.reduce(op.Mul, a), start)
        return op.Unsqueeze(chunks.join(states[:-1], self.state), [2])

    def double(self, a: Any, v: Any, start: Any) -> Any:
        """The same by doubling the number of chunks that each state covers."""
        op = self.op
        a = self.shifted(a, 1, 1.0)
        if start is None:
            v = self.shifted(v, 1, 0.0)
        elif self.reverse:
            v = op.Slice(op.Concat(v, start, axis=1), [1], [_END], [1])
        else:
            v = op.Slice(op.Concat(start, v, axis=1), [0], [-1], [1])
        for power in range(DOUBLINGS):
            v = op.Add(op.Mul(a, self.shifted(v, 2**power, 0.0)), v)
            a = op.Mul(a, self.shifted(a, 2**power, 1.0))
        return v

    def shifted(self, x: Any, places: int, filler: float) -> Any:
        """``x`` moved in the direction of the scan."""
        op = self.op
        if self.reverse:
            return op.Slice(op.Pad(x, [0, places], filler, [1]), [places], [_END], [1])
        return op.Slice(op.Pad(x, [places, 0], filler, [1]), [0], [-places], [1])
