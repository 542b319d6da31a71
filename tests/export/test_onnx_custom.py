"""mmvim's operator in onnxruntime, against the op in PyTorch."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmvim import ops
from mmvim.export import onnx_scan
from mmvim.export.formats import export_model, open_exported, read_metadata
from mmvim.export.quantization import quantize
from mmvim.export.streaming import export_stream
from mmvim.models import StreamingVideoMamba, Vim, VMamba

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias', 'initial_state', 'seq_idx')
SMALL = dict(embed_dims=16, depth=1, d_state=4)


@pytest.fixture(scope='module')
def library():
    try:
        return onnx_scan.custom_library()
    except RuntimeError as error:
        pytest.skip(str(error))


def scan(library, inputs, threads=1, **attributes):
    """Run a graph of one operator."""
    helper, kinds = onnx.helper, onnx.TensorProto
    attributes = dict(delta_softplus=1, discretization='zoh', reverse=0) | attributes
    given = {name: x.numpy() for name, x in zip(NAMES, inputs, strict=True) if x is not None}
    node = helper.make_node(
        onnx_scan.OPERATOR,
        [name if name in given else '' for name in NAMES],
        ['y', 'end'],
        domain=onnx_scan.DOMAIN,
        **attributes,
    )
    values = [
        helper.make_tensor_value_info(
            name, kinds.INT32 if name == 'seq_idx' else kinds.FLOAT, [None] * x.ndim
        )
        for name, x in given.items()
    ]
    results = [helper.make_tensor_value_info(name, kinds.FLOAT, [None] * 3) for name in node.output]
    graph = helper.make_graph([node], 'scan', values, results)
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid(onnx_scan.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )
    return list(map(torch.from_numpy, session.run(None, given)))


def scan_inputs(method='zoh', groups=1, whole=True, length=37):
    generator = torch.Generator().manual_seed(0)
    b, d, n = 2, 34, 5

    def random(*shape):
        return torch.randn(shape, generator=generator)

    u, delta = random(b, length, d), random(b, length, d)
    B, C = random(b, length, groups, n), random(b, length, groups, n)
    required = u, delta, -random(d, n).exp(), B, C
    if not whole:
        return *required, None, None, None, None
    parts = 2 if method in ops.TWO_TAP else 1
    numbers = (torch.arange(length) // 9).int().expand(b, length).contiguous()
    return *required, random(d), random(d), random(b, d, parts * n), numbers


@pytest.mark.parametrize('method', ops.DISCRETIZATIONS)
def test_every_discretization(method, library):
    for reverse, groups, whole in ((0, 1, False), (1, 2, True), (0, 2, True), (1, 1, False)):
        inputs = scan_inputs(method, groups, whole)
        *first, bias, start, numbers = inputs
        expected = ops.selective_scan(
            *first,
            delta_bias=bias,
            delta_softplus=True,
            discretization=method,
            reverse=bool(reverse),
            initial_state=start,
            return_last_state=True,
            seq_idx=numbers,
        )
        given = scan(library, inputs, threads=2, discretization=method, reverse=reverse)
        for x, y in zip(given, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_threads_change_nothing(library):
    inputs = scan_inputs()
    for one, many in zip(scan(library, inputs), scan(library, inputs, threads=3), strict=True):
        assert torch.equal(one, many)


def test_nothing_to_scan(library):
    inputs = scan_inputs(length=0)
    y, end = scan(library, inputs)
    assert y.shape == (2, 0, 34)
    torch.testing.assert_close(end, inputs[7])


@pytest.mark.parametrize('name', NAMES)
def test_wrong_shapes_are_named(name, library):
    inputs = list(scan_inputs())
    place = NAMES.index(name)
    inputs[place] = torch.cat((inputs[place], inputs[place]), -1)
    wrong = {'u': 'delta', 'A': 'B'}.get(name, name)
    with pytest.raises(Exception, match=rf'selective_scan: {wrong} must have shape \('):
        scan(library, inputs)


def test_what_has_no_meaning_is_refused(library):
    with pytest.raises(Exception, match="unknown discretization 'euler'"):
        scan(library, scan_inputs(), discretization='euler')
    inputs = list(scan_inputs())
    inputs[3] = inputs[4] = torch.zeros(2, 37, 3, 5)
    with pytest.raises(Exception, match='groups of B must divide the channels'):
        scan(library, inputs)


PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(('torch', 'mmvim', 'mmengine')))
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library('./scan.library')
session = onnxruntime.InferenceSession('m.onnx', options)
np.save('y.npy', session.run(None, {'images': np.load('x.npy')})[0])
"""


@pytest.mark.parametrize(
    'build',
    [
        lambda: Vim(SMALL, img_size=32, discretization='tustin'),
        pytest.param(
            lambda: VMamba(dict(depths=(1, 1), embed_dims=8, d_state=2)), marks=pytest.mark.slow
        ),
    ],
    ids=['vim', 'vmamba'],
)
def test_a_file_and_the_library_are_enough(build, library, tmp_path):
    pytest.importorskip('onnxscript')
    torch.manual_seed(0)
    model, path = build().eval(), tmp_path / 'm.onnx'
    options = dict(custom_ops=True, metadata={'a': 1})
    report = export_model(model, path, 'onnx', (1, 3, 32, 32), **options)
    assert max(report.differences.values()) < 1e-5
    assert read_metadata(path) == {'a': 1}
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    own = [node.op_type for node in written.graph.node if node.domain]
    assert set(own) == {onnx_scan.OPERATOR}
    assert not {'Exp', 'Loop', 'Scan', 'If'} & {node.op_type for node in written.graph.node}
    x = torch.randn(3, 3, 32, 32)
    np.save(tmp_path / 'x.npy', x.numpy())
    shutil.copyfile(library, tmp_path / 'scan.library')
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=tmp_path, env=environment, check=True, timeout=300
    )
    with torch.no_grad():
        expected = model(x)[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), expected, atol=1e-5)
    quantize(path, tmp_path / 'q.onnx', 'dynamic')
    (given,) = open_exported(tmp_path / 'q.onnx')(x.numpy())
    assert 0 < np.abs(given - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.slow
def test_a_stream_keeps_its_states(library, tmp_path):
    pytest.importorskip('onnxscript')
    torch.manual_seed(0)
    model = StreamingVideoMamba(
        dict(embed_dims=16, depth=2, d_state=4),
        img_size=16, patch_size=8, num_frames=4, stream_mode='block', block_frames=2,
        beyond='clamp', discretization='tustin',
    ).eval()  # fmt: skip
    differences = export_stream(model, tmp_path / 'm.onnx', (1, 3, 2, 16, 16), custom_ops=True)
    assert max(differences.values()) < 1e-5
    for path in differences:
        own = {node.op_type for node in onnx.load(path).graph.node if node.domain}
        assert own == {onnx_scan.OPERATOR}


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(
        onnx_scan, 'backend_info', lambda: {'loaded': False, 'reason': 'no compiler'}
    )
    with pytest.raises(RuntimeError, match='part of the kernels, but no compiler'):
        onnx_scan.custom_library()
    missing = {'loaded': True, 'library': str(tmp_path / '_C.so')}
    monkeypatch.setattr(onnx_scan, 'backend_info', lambda: missing)
    with pytest.raises(RuntimeError, match='is missing: build the kernels again'):
        onnx_scan.custom_library()
