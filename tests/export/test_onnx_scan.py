"""The scan in standard ONNX operators, against the op and without PyTorch's exporter."""

import numpy as np
import pytest
import torch

from mmvim import ops
from mmvim.export import onnx_scan
from mmvim.export.operations import _direction

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def model_of(kind, inputs, *, length, reverse, has_start, channels):
    """A model that is one scan of any batch, and of any length if ``length`` is 0."""
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    *groups, states = inputs[onnx_scan._WRITERS[kind][1] - 1].shape[2:]
    whole = {'ScanZoh': (0, 1, 3, 4), 'ScanGeneral': (0, 1, 2)}[kind]

    def tensor(name, shape):
        return helper.make_tensor_value_info(name, single, shape)

    names = [f'x{i}' for i in range(len(inputs))]
    given = []
    for i, (name, x) in enumerate(zip(names, inputs, strict=True)):
        shape = list(x.shape)
        if i in whole:
            shape[:2] = 'b', length or 'l'
        elif i == len(names) - 1 and has_start:
            shape[0] = 'b'
        given.append(tensor(name, shape))
    attributes = dict(length=length, reverse=int(reverse), groups=[1, *groups][-1])
    attributes.update(states=states, channels=channels)
    node = helper.make_node(kind, names, ['y', 'end'], domain=onnx_scan.DOMAIN, **attributes)
    outputs = [
        tensor('y', ['b', length or 'l', *groups, channels]),
        tensor('end', ['b', *groups, states, channels]),
    ]
    graph = helper.make_graph([node], 'scan', given, outputs)
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid(onnx_scan.DOMAIN, 1)]
    model = onnx_scan.expand(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {''}
    return model


def run(model, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )
    names = [x.name for x in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


class Recorder:
    """Runs a scan in onnxruntime in place of an export's opaque operator."""

    def __init__(self, monkeypatch, dynamic):
        self.dynamic = dynamic
        monkeypatch.setattr(onnx_scan, '_opaque', self)
        monkeypatch.setattr(onnx_scan, 'softplus', torch.nn.functional.softplus)

    def __call__(self, kind, inputs, C, channels, reverse):
        arrays = [x.numpy() for x in inputs if x is not None]
        model = model_of(
            kind,
            arrays,
            length=0 if self.dynamic else C.shape[1],
            reverse=reverse,
            has_start=inputs[-1] is not None,
            channels=channels,
        )
        return tuple(map(torch.from_numpy, run(model, arrays)))


def scan_inputs(length, groups=1, scale=1.0):
    generator = torch.Generator().manual_seed(length)
    b, d, n = 2, 4, 3
    u, delta = torch.randn(2, b, length, d, generator=generator)
    B, C = torch.randn(2, b, length, groups, n, generator=generator)
    A = -torch.rand(d, n, generator=generator) * scale - 0.01
    D, bias = torch.randn(2, d, generator=generator)
    return u, delta, A, B, C, D, bias


@pytest.mark.parametrize('method', ops.DISCRETIZATIONS)
@pytest.mark.parametrize(
    ('length', 'dynamic', 'groups', 'scale'),
    [
        (1, False, 1, 1),
        (5, False, 2, 1),
        (37, True, 1, 1),
        # Chunks of chunks, and decays that vanish.
        (611, False, 1, 1),
        (611, False, 1, 1e3),
        (611, True, 2, 1),
        (9000, True, 1, 0.01),
    ],
)
def test_every_method_and_length(method, length, dynamic, groups, scale, monkeypatch):
    inputs = scan_inputs(length, groups, scale)
    states = torch.randn(2, 4, 6 if method in ops.TWO_TAP else 3)
    Recorder(monkeypatch, dynamic)
    for reverse, start in ((False, None), (True, states), (True, None), (False, states)):
        y, end = _direction('onnx', *inputs, True, method, reverse, start)
        wide = [x.double() for x in inputs]
        kwargs = dict(delta_bias=wide.pop(), delta_softplus=True, discretization=method)
        kwargs.update(reverse=reverse, return_last_state=True)
        kwargs['initial_state'] = None if start is None else start.double()
        expected = ops.selective_scan(*wide, **kwargs)
        for given, right in zip((y, end), expected, strict=True):
            right = right.float()
            error = (given - right).abs().max() / right.abs().max()
            assert error < 1e-5


def test_softplus():
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node('FastSoftplus', ['x'], ['y'], domain=onnx_scan.DOMAIN)
    values = [helper.make_tensor_value_info(name, single, ['n']) for name in 'xy']
    graph = helper.make_graph([node], 'softplus', values[:1], values[1:])
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid(onnx_scan.DOMAIN, 1)]
    model = onnx_scan.expand(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    x = torch.cat((torch.linspace(-100, 100, 4001), torch.tensor([-1e4, 0.0, 1e4])))
    (y,) = map(torch.from_numpy, run(model, [x.numpy()]))
    expected = torch.logaddexp(x.double(), torch.zeros(()).double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-37)


def test_a_sequence_that_is_too_long_is_an_error(monkeypatch):
    monkeypatch.setattr(onnx_scan, 'DOUBLINGS', 1)
    monkeypatch.setattr(onnx_scan, 'MAX_DYNAMIC_LENGTH', 2 * onnx_scan.MAX_STEPS**2)
    a, drive = np.full((2, 1, 600, 2, 3), 0.5, np.float32)
    C = np.ones((1, 600, 2), np.float32)
    inputs = a, drive, C
    model = model_of('ScanGeneral', inputs, length=0, reverse=False, has_start=False, channels=3)
    assert np.isfinite(run(model, [x[:, :512] for x in inputs])[0]).all()
    with pytest.raises(Exception, match='out of data bounds'):
        run(model, [x[:, :513] for x in inputs])
