"""Exported files give the model's outputs, also where mmvim is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmvim import ops
from mmvim.export import formats
from mmvim.export.formats import (
    METADATA,
    ExportError,
    export_model,
    open_exported,
    read_metadata,
)
from mmvim.export.operations import portable_ops
from mmvim.export.quantization import quantize
from mmvim.models import MambaVision, VideoMamba, Vim, VMamba

# The operators among ours that docs/operators.md of github.com/onnx/onnx-tensorrt calls supported:
# LayerNormalization since TensorRT 8.6, the others since 8.5. Loop, Scan and If are left out.
# fmt: off
TENSORRT = {
    'Abs', 'Add', 'BatchNormalization', 'Cast', 'Ceil', 'Clip', 'Concat', 'Constant', 'Conv',
    'Div', 'Equal', 'Erf',
    'Exp', 'Expand', 'Flatten', 'Floor', 'Gather', 'Gemm', 'GlobalAveragePool', 'Greater',
    'Identity', 'LayerNormalization', 'Less', 'Log', 'MatMul', 'Max', 'Min', 'Mod', 'Mul',
    'Neg', 'Pad', 'Pow', 'Range', 'Reciprocal', 'ReduceMean', 'ReduceSum', 'Relu', 'Reshape',
    'Resize', 'Shape', 'Sigmoid', 'Slice', 'Softmax', 'Split', 'Sqrt', 'Squeeze', 'Sub', 'Tanh',
    'Tile', 'Transpose', 'Unsqueeze', 'Where',
}
# fmt: on
SMALL = dict(embed_dims=16, depth=1, d_state=4)
FAMILIES = {
    'vim': (lambda: Vim(SMALL, img_size=64), (1, 3, 64, 64)),
    'mambavision': (
        lambda: MambaVision(dict(depths=(1, 1, 1, 1), embed_dims=8, stem_dims=8, num_heads=(2, 2))),
        (1, 3, 64, 64),
    ),
    'vmamba': (lambda: VMamba(dict(depths=(1, 1), embed_dims=8, d_state=2)), (1, 3, 64, 64)),
    'videomamba': (lambda: VideoMamba(SMALL, img_size=64, num_frames=4), (1, 3, 4, 64, 64)),
}


def scan_inputs(groups=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    b, length, d, n = 2, 7, 6, 3
    u, delta, z = torch.randn(3, b, length, d, generator=generator, dtype=dtype)
    B, C = torch.randn(2, b, length, groups, n, generator=generator, dtype=dtype)
    A = -torch.rand(d, n, generator=generator, dtype=dtype) - 0.1
    D, bias = torch.randn(2, d, generator=generator, dtype=dtype)
    return u, delta, A, B, C, D, z, bias


@pytest.mark.parametrize('kind', ['graph', 'script'])
@pytest.mark.parametrize('method', ops.DISCRETIZATIONS)
def test_portable_scan(kind, method):
    *inputs, z, bias = scan_inputs(groups=2)
    width = 3 * (2 if method in ops.TWO_TAP else 1)
    for reverse, start in ((False, None), (True, None), (False, width), (True, 3)):
        kwargs = dict(delta_softplus=True, discretization=method, reverse=reverse)
        if start is not None:
            kwargs['initial_state'] = torch.randn(2, 6, start, dtype=torch.float64)
            kwargs['return_last_state'] = True
        expected = ops.selective_scan(*inputs, z, bias, **kwargs)
        with portable_ops(kind):
            given = ops.selective_scan(*inputs, z, bias, **kwargs)
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize('kind', ['graph', 'script'])
@pytest.mark.parametrize('rank', [None, 2])
def test_portable_cross_scan(kind, rank):
    b, h, w, k, d, n = 2, 3, 4, 4, 5, 2
    generator = torch.Generator().manual_seed(0)
    B, C = torch.randn(2, b, h, w, k, n, generator=generator, dtype=torch.float64)
    x, delta, A, D, bias, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((b, h, w, d), (b, h, w, k, rank or d), (k, d, n), (k, d), (k, d), (k, d, 2))
    )
    kwargs = dict(delta_softplus=True, delta_weight=None if rank is None else weight)
    for routes in (ops.ROUTES, ('columns_reversed',), ('columns', 'rows')):
        delta_k, B_k, C_k = (t[:, :, :, : len(routes)] for t in (delta, B, C))
        A_k, D_k, bias_k = (t[: len(routes)] for t in (-A.exp(), D, bias))
        if rank is not None:
            kwargs['delta_weight'] = weight[: len(routes)]

        def run(args=(x, delta_k, A_k, B_k, C_k, D_k, bias_k), routes=routes):
            return ops.cross_scan(*args, routes=routes, **kwargs)

        expected = run()
        with portable_ops(kind):
            given = run()
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize('kind', ['graph', 'script'])
def test_other_portable_ops(kind):
    *inputs, z, bias = scan_inputs()
    direction = ops.ScanInputs(*inputs, bias)
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = inputs[0]

    def run():
        return (
            ops.bidirectional_scan(direction, direction, z, scale=0.5, delta_softplus=True),
            *(
                ops.causal_conv1d(x, weight, bias, activation='silu', mode=mode)
                for mode in ('causal', 'reverse', 'same')
            ),
            *ops.bidirectional_conv1d(x, weight, None, weight, bias),
            *(
                part
                for mode in ('causal', 'reverse')
                for state in (None, z[:, :3].transpose(1, 2))
                for part in ops.causal_conv1d(
                    x, weight, bias, mode=mode, initial_state=state, return_last_state=True
                )
            ),
            *ops.add_rms_norm(x, bias, z),
            *ops.add_rms_norm(x.bfloat16(), bias.float()),
        )

    expected = run()
    with portable_ops(kind):
        given = run()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('kind', ['graph', 'script'])
def test_portable_packed_sequences(kind):
    *inputs, z, bias = scan_inputs(groups=2)
    x = inputs[0]
    weight = torch.randn(x.shape[2], 4, dtype=torch.float64)
    taps = torch.randn(x.shape[0], x.shape[2], 3, dtype=torch.float64)
    states = torch.randn(x.shape[0], *inputs[2].shape, dtype=torch.float64)
    direction = ops.ScanInputs(*inputs, bias)
    seq_idx = (torch.arange(x.shape[1]) // 2).int().expand(x.shape[:2])
    options = {'return_last_state': True, 'seq_idx': seq_idx}

    def run():
        results = [
            ops.bidirectional_scan(direction, direction, z, delta_softplus=True, seq_idx=seq_idx),
            ops.causal_conv1d(x, weight, mode='same', seq_idx=seq_idx),
        ]
        for method, reverse in (('zoh', False), ('tustin', True)):
            results += ops.selective_scan(
                *inputs,
                z,
                bias,
                delta_softplus=True,
                initial_state=states,
                discretization=method,
                reverse=reverse,
                **options,
            )
            mode = 'reverse' if reverse else 'causal'
            results += ops.causal_conv1d(x, weight, mode=mode, initial_state=taps, **options)
        return results

    expected = run()
    with portable_ops(kind):
        given = run()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_kind():
    with (
        pytest.raises(ValueError, match='kind must be one of'),
        portable_ops('lisp'),
    ):
        pass


def run_elsewhere(program: str, cwd: Path) -> str:
    """Run Python where neither mmvim nor an mm package can be imported."""
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    guard = (
        'import sys\n'
        'class Guard:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        "        if name.split('.')[0] in ('mmvim', 'mmengine', 'mmcv', 'mmpretrain'):\n"
        '            raise ModuleNotFoundError(name)\n'
        'sys.meta_path.insert(0, Guard())\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', guard + program],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


RUNNERS = {
    '.onnx': 'import onnxruntime as o; s = o.InferenceSession("m.onnx"); '
    'y = s.run(None, {"images": x})[0]',
    '.ts': 'import torch; y = torch.jit.load("m.ts")(torch.from_numpy(x)).numpy()',
    '.pt2': 'import torch; y = torch.export.load("m.pt2").module()(torch.from_numpy(x)).numpy()',
    '.aoti.pt2': 'import torch; y = torch._inductor.aoti_load_package("m.aoti.pt2")'
    '(torch.from_numpy(x)).numpy()',
}


def check(family, format, suffix, dynamic, tmp_path):
    torch.manual_seed(0)
    build, shape = FAMILIES[family]
    if format == 'aoti':
        # With one image, torch 2.14 generates C++ that does not compile.
        shape = (2, *shape[1:])
    model = build().eval()
    # Released positions are not zero, and resizing zeros would prove nothing.
    for name, parameter in model.named_parameters():
        if 'pos_embed' in name:
            torch.nn.init.normal_(parameter)
    report = export_model(
        model, tmp_path / f'm{suffix}', format, shape, dynamic=dynamic, metadata={'mean': [1.0]}
    )
    assert len(report.differences) == {'none': 1, 'batch': 2, 'size': 4}[dynamic]
    assert max(report.differences.values()) < 1e-4
    (x,) = (np.random.default_rng(0).standard_normal(shape, np.float32),)
    if dynamic != 'none':
        x = np.concatenate((x, x + 1, x + 2, x + 3))
    np.save(tmp_path / 'x.npy', x)
    run_elsewhere(
        f'import numpy as np; x = np.load("x.npy"); {RUNNERS[suffix]}; np.save("y.npy", y)',
        tmp_path,
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), expected, atol=1e-4)


@pytest.mark.parametrize(
    'family', ['vim', *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:])]
)
def test_onnx(family, tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    check(family, 'onnx', '.onnx', 'batch', tmp_path)
    model = onnx.load(tmp_path / 'm.onnx')
    assert {node.domain for node in model.graph.node} == {''}
    assert not model.functions
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / 'm.onnx').read_bytes()
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= TENSORRT
    assert [entry.version for entry in model.opset_import] == [18]
    assert json.loads({p.key: p.value for p in model.metadata_props}[METADATA]) == {'mean': [1.0]}


@pytest.mark.slow
def test_onnx_in_a_fresh_environment(tmp_path):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model = Vim(SMALL, img_size=32).eval()
    export_model(model, tmp_path / 'm.onnx', 'onnx', (1, 3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    np.save(tmp_path / 'x.npy', x.numpy())
    python = tmp_path / 'venv/bin/python'
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}

    def run(*command):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)

    run(sys.executable, '-m', 'venv', 'venv')
    run(python, '-m', 'pip', 'install', '-q', 'onnxruntime')
    run(python, '-c', 'import importlib.util as u; assert not u.find_spec("torch")')
    program = f'import numpy as np; x = np.load("x.npy"); {RUNNERS[".onnx"]}; np.save("y.npy", y)'
    run(python, '-c', program)
    with torch.no_grad():
        expected = model(x)[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / 'y.npy'), expected, atol=1e-4)


@pytest.mark.parametrize('opset', [18, 20, 22])
def test_opset(opset, tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    out = tmp_path / 'm.onnx'
    report = export_model(Vim(SMALL, img_size=32), out, 'onnx', (1, 3, 32, 32), opset=opset)
    assert max(report.differences.values()) < 1e-4
    assert {entry.domain: entry.version for entry in onnx.load(out).opset_import}[''] == opset


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_onnx_of_any_size(family, tmp_path):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    check(family, 'onnx', '.onnx', 'size', tmp_path)


@pytest.mark.parametrize('family', FAMILIES)
def test_torchscript(family, tmp_path):
    check(family, 'torchscript', '.ts', 'size', tmp_path)


@pytest.mark.slow
def test_exported_program(tmp_path):
    check('vim', 'program', '.pt2', 'size', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_exported_program_of_each_family(family, tmp_path):
    check(family, 'program', '.pt2', 'batch', tmp_path)


@pytest.mark.parametrize(
    'family', ['vim', *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:])]
)
def test_own_operators_in_a_program(family, tmp_path):
    torch.manual_seed(0)
    build, shape = FAMILIES[family]
    model, out = build().eval(), tmp_path / 'm.pt2'
    report = export_model(model, out, 'program', shape, dynamic='size', custom_ops=True)
    assert max(report.differences.values()) < 1e-5
    targets = {str(node.target) for node in torch.export.load(out).graph.nodes}
    assert any(name.startswith('mmvim.') and 'scan' in name for name in targets)
    with pytest.raises(ValueError, match="format 'torchscript' has no custom_ops"):
        export_model(model, tmp_path / 'm.ts', 'torchscript', shape, custom_ops=True)


@pytest.mark.slow
def test_own_operators_in_an_aoti_package(tmp_path):
    # VMamba's portable scans generate C++ that does not compile; neither do those of one image.
    build, shape = FAMILIES['vmamba']
    report = export_model(
        build().eval(), tmp_path / 'm.aoti.pt2', 'aoti', shape, dynamic='none', custom_ops=True
    )
    assert max(report.differences.values()) < 1e-5


@pytest.mark.slow
def test_aoti_package(tmp_path):
    check('vim', 'aoti', '.aoti.pt2', 'none', tmp_path)
    about = {'classes': ['ä "b"', 'c'], 'shape': [3, 8, 8]}
    out = tmp_path / 'm.aoti.pt2'
    conv = torch.nn.Conv2d(3, 2, 3)
    export_model(conv, out, 'aoti', (1, 3, 8, 8), dynamic='none', metadata=about, overwrite=True)
    assert read_metadata(out) == about


def test_int8(tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model = Vim(dict(embed_dims=64, depth=1), img_size=64)
    path = tmp_path / 'm.onnx'
    export_model(model, path, 'onnx', (1, 3, 64, 64))
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    (expected,) = open_exported(path)(x)
    kinds = {'dynamic': 'MatMulInteger', 'static': 'QuantizeLinear', 'weights': 'MatMulNBits'}
    for mode, kind in kinds.items():
        out = tmp_path / f'{mode}.onnx'
        quantize(path, out, mode, images=[x] if mode == 'static' else None)
        nodes = [node.op_type for node in onnx.load(out).graph.node]
        assert {kind, 'Exp'} <= set(nodes)
        assert out.stat().st_size < 0.8 * path.stat().st_size
        (given,) = open_exported(out)(x)
        assert 0 < np.abs(given - expected).max() < 0.1 * np.abs(expected).max()
    # Nothing inside a scan: only what comes from a projection or goes into one.
    static = onnx.load(tmp_path / 'static.onnx').graph
    constants = {initializer.name for initializer in static.initializer}
    producers = {name: node for node in static.node for name in node.output}
    for node in static.node:
        if node.op_type == 'MatMul' and node.input[1] in producers:
            weight = producers[node.input[1]]
            assert weight.op_type != 'DequantizeLinear' or weight.input[0] in constants
    with pytest.raises(FileExistsError):
        quantize(path, tmp_path / 'static.onnx')
    with pytest.raises(ValueError, match='mode must be one of'):
        quantize(path, tmp_path / 'x.onnx', 'int4')
    with pytest.raises(ValueError, match="needed for mode 'static', and for no other"):
        quantize(path, tmp_path / 'x.onnx', 'static')
    assert not (tmp_path / 'x.onnx').exists()


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision(dtype, tmp_path):
    model = Vim(SMALL, img_size=32)
    out = tmp_path / 'm.ts'
    report = export_model(model, out, 'torchscript', (1, 3, 32, 32), dtype=dtype)
    assert max(report.differences.values()) > 1e-5
    kinds = {parameter.dtype for parameter in torch.jit.load(str(out)).parameters()}
    assert getattr(torch, dtype) in kinds
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(ExportError, match='differs from the model'):
        export_model(
            model, tmp_path / 'x.ts', 'torchscript', (1, 3, 32, 32), dtype=dtype, tolerance=1e-9
        )
    with pytest.raises(ValueError, match='dtype must be one of'):
        export_model(model, tmp_path / 'x.ts', 'torchscript', (1, 3, 32, 32), dtype='int4')


class Doubling(torch.nn.Module):
    """Gives another result when it is traced."""

    def forward(self, x):
        return x * (2 if torch.jit.is_tracing() else 1)


def test_bad_requests_leave_nothing_behind(tmp_path):
    model = Vim(SMALL, img_size=32)
    shape = (1, 3, 32, 32)
    out = tmp_path / 'm.ts'
    with pytest.raises(ValueError, match='format must be one of'):
        export_model(model, out, 'caffe', shape)
    with pytest.raises(ValueError, match='dynamic must be one of'):
        export_model(model, out, 'onnx', shape, dynamic='yes')
    with pytest.raises(ValueError, match='compiled for one shape'):
        export_model(model, out, 'aoti', shape)
    with pytest.raises(ValueError, match='input_shape must be'):
        export_model(model, out, 'onnx', (3, 32, 32))
    for format, opset in (('onnx', 11), ('onnx', 'new'), ('torchscript', 18)):
        with pytest.raises(ValueError, match=r'opset=.* must be an integer from 18'):
            export_model(model, out, format, shape, opset=opset)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        export_model(model, tmp_path / 'no' / 'm.ts', 'torchscript', shape)
    with pytest.raises(ExportError, match='differs from the model'):
        export_model(Doubling(), out, 'torchscript', shape)
    with pytest.raises(ExportError, match='cannot be exported as torchscript'):
        export_model(model, out, 'torchscript', (1, 4, 32, 32))
    assert list(tmp_path.iterdir()) == []
    out.write_text('mine')
    with pytest.raises(FileExistsError):
        export_model(model, out, 'torchscript', shape)
    assert out.read_text() == 'mine'
    with pytest.raises(ValueError, match='must end with one of'):
        open_exported(tmp_path / 'm.bin')


@pytest.mark.parametrize('custom_ops', [False, True])
def test_generated_code_that_does_not_compile(custom_ops, tmp_path, monkeypatch):
    def write(*args, **options):
        raise RuntimeError('CppCompileError: C++ compile error\n\nCommand: g++')

    monkeypatch.setitem(formats._WRITERS, 'aoti', write)
    options = dict(dynamic='none', custom_ops=custom_ops)
    with pytest.raises(ExportError, match='CppCompileError: C') as found:
        export_model(nn.Identity(), tmp_path / 'm.aoti.pt2', 'aoti', (1, 3, 8, 8), **options)
    assert ('--custom-ops' in str(found.value)) is not custom_ops
