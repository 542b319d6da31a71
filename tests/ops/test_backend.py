"""Choice of the implementation, in forward and backward, and its precedence."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from ops_support import cross_scan_inputs, randn, scan_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim import ops
from mmvim.ops import backend as backend_module
from mmvim.ops import extension, get_backend, intercept_ops, set_backend, use_backend


class Calls(TorchDispatchMode):
    """Names of mmvim's ops as they are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith('mmvim'):
            self.names.append(f'{func.namespace}::{func._opname}')
        return func(*args, **(kwargs or {}))


@pytest.fixture
def everything_compiled(monkeypatch):
    """As if every op had a compiled kernel; where it has none, the dispatcher falls back."""
    monkeypatch.setattr(extension, 'supports', lambda op, device_type, dtype: True)


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(extension, 'supports', lambda op, device_type, dtype: False)
    monkeypatch.setattr(extension, 'why_not', lambda: 'the reason')


@pytest.fixture(autouse=True)
def process_default():
    before = get_backend()
    yield
    set_backend(before)


def call_selective_scan(**options):
    tensors = scan_inputs(1, 5, 2, 3, dtype=torch.float32)
    return ops.selective_scan(tensors.pop('u').requires_grad_(), **tensors, **options)


def call_bidirectional_scan(**options):
    tensors = scan_inputs(1, 5, 2, 3, optional=False, dtype=torch.float32)
    inputs = ops.ScanInputs(**tensors)
    inputs.u.requires_grad_()
    return ops.bidirectional_scan(inputs, inputs, **options)


def call_cross_scan(**options):
    tensors = cross_scan_inputs(1, 3, 2, 2, 3, dtype=torch.float32)
    return ops.cross_scan(tensors.pop('x').requires_grad_(), **tensors, **options)


def call_causal_conv1d(**options):
    x = randn(1, 5, 2, dtype=torch.float32).requires_grad_()
    return ops.causal_conv1d(x, torch.ones(2, 4), **options)


def call_bidirectional_conv1d(**options):
    x = randn(1, 5, 2, dtype=torch.float32).requires_grad_()
    weight = torch.ones(2, 4)
    return sum(ops.bidirectional_conv1d(x, weight, None, weight, None, **options))


def call_add_rms_norm(**options):
    x = randn(1, 5, 2, dtype=torch.float32).requires_grad_()
    return ops.add_rms_norm(x, torch.ones(2), **options)[0]


CALLS = {
    'selective_scan': call_selective_scan,
    'bidirectional_scan': call_bidirectional_scan,
    'cross_scan': call_cross_scan,
    'causal_conv1d': call_causal_conv1d,
    'bidirectional_conv1d': call_bidirectional_conv1d,
    'add_rms_norm': call_add_rms_norm,
}


def dispatched(function, **options):
    """Targets of forward and backward, backward on a thread without a choice of its own."""
    with Calls() as forward:
        out = function(**options)
    seen = []

    def run_backward():
        with use_backend('auto'), Calls() as backward:
            out.sum().backward()
        seen.extend(backward.names)

    thread = threading.Thread(target=run_backward)
    thread.start()
    thread.join()
    return forward.names + seen


@pytest.mark.parametrize('op', CALLS)
@pytest.mark.parametrize(
    ('choice', 'namespace'), [('torch', 'mmvim_torch'), ('compiled', 'mmvim'), ('auto', 'mmvim')]
)
@pytest.mark.parametrize('how', ['argument', 'context', 'process'])
@pytest.mark.usefixtures('everything_compiled')
def test_choice_holds_in_forward_and_backward(op, choice, namespace, how):
    options = {}
    if how == 'argument':
        options = {'backend': choice}
    elif how == 'process':
        set_backend(choice)
    if how == 'context':
        with use_backend(choice):
            names = dispatched(CALLS[op])
    else:
        names = dispatched(CALLS[op], **options)
    assert names == [f'{namespace}::{op}', f'{namespace}::{op}_backward']


@pytest.mark.usefixtures('everything_compiled')
def test_precedence():
    def namespace(**options):
        return dispatched(call_causal_conv1d, **options)[0].partition('::')[0]

    set_backend('torch')
    assert get_backend() == 'torch'
    assert namespace() == 'mmvim_torch'
    with use_backend('compiled'):
        assert get_backend() == 'compiled'
        assert namespace() == 'mmvim'
        assert namespace(backend='torch') == 'mmvim_torch'
        with use_backend('torch'):
            assert namespace() == 'mmvim_torch'
            assert namespace(backend='compiled') == 'mmvim'
            # 'auto' as an argument is no preference.
            assert namespace(backend='auto') == 'mmvim_torch'
            with use_backend('auto'):
                assert namespace() == 'mmvim'
        assert namespace() == 'mmvim'
    assert namespace() == 'mmvim_torch'


def test_context_is_left_after_an_error():
    before = get_backend()
    with pytest.raises(KeyError), use_backend('torch'):
        raise KeyError
    assert get_backend() == before


def test_a_context_concerns_its_thread_only():
    inside, outside = threading.Event(), threading.Event()
    seen = {}

    def other():
        with use_backend('torch'):
            inside.set()
            outside.wait(10)
            seen['other'] = get_backend()

    set_backend('compiled')
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen['here'] = get_backend()
    outside.set()
    thread.join()
    assert seen == {'here': 'compiled', 'other': 'torch'}


@pytest.mark.usefixtures('nothing_compiled')
def test_compiled_that_is_not_there_is_an_error():
    for op, function in CALLS.items():
        kernel = 'selective_scan' if op == 'cross_scan' else op  # it runs on those of the scan
        with pytest.raises(
            RuntimeError, match=rf"'compiled'.* {kernel} .*torch.float32.*the reason"
        ):
            function(backend='compiled')
    assert dispatched(call_causal_conv1d)[0] == 'mmvim_torch::causal_conv1d'


@pytest.mark.parametrize('op', CALLS)
def test_ops_are_seen_and_replaced(op):
    calls = []

    def outer(real, *args):
        calls.append('outer')
        return real(*args)

    def inner(real, *args):
        calls.append('inner')
        return tuple(2 * x for x in real(*args))

    def first():
        out = CALLS[op]()
        return out if isinstance(out, torch.Tensor) else out[0]

    torch.manual_seed(0)
    expected = first()
    with intercept_ops(**{op: outer}):
        with intercept_ops(**{op: inner}):
            torch.manual_seed(0)
            torch.testing.assert_close(first(), 2 * expected)
        assert calls == ['inner', 'outer']
        torch.manual_seed(0)
        torch.testing.assert_close(first(), expected)
    assert calls == ['inner', 'outer', 'outer']
    torch.manual_seed(0)
    torch.testing.assert_close(first(), expected)
    assert len(calls) == 3


@pytest.mark.parametrize('name', ['scan', 'selective_scan_backward'])
def test_only_ops_can_be_intercepted(name):
    with pytest.raises(ValueError, match=f"'{name}' is no op that can be intercepted"):
        intercept_ops(**{name: print})


@pytest.mark.parametrize('choose', [set_backend, use_backend])
def test_unknown_backend(choose):
    with pytest.raises(ValueError, match=r"backend must be one of .*'auto'.*got 'cuda'"):
        choose('cuda')


def test_unknown_backend_argument():
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'fast'"):
        call_causal_conv1d(backend='fast')


@pytest.mark.usefixtures('nothing_compiled')
def test_auto_warns_once_on_cuda(monkeypatch):
    monkeypatch.setattr(backend_module, '_warned', False)
    decide = backend_module._compiled
    with pytest.warns(
        UserWarning, match='causal_conv1d on a CUDA device through PyTorch.*the reason'
    ):
        assert not decide('auto', 'causal_conv1d', 'cuda', torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not decide('auto', 'selective_scan', 'cuda', torch.float32)
    monkeypatch.setattr(backend_module, '_warned', False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not decide('torch', 'selective_scan', 'cuda', torch.float32)
        assert not decide('auto', 'selective_scan', 'cpu', torch.float32)


def in_process(choice):
    """Import the ops where only torch is installed, under a choice for the process."""
    code = (
        'import sys\n'
        "for name in ('mmengine', 'mmcv', 'einops', 'mmdet', 'mmseg', 'mmpretrain'):\n"
        '    sys.modules[name] = None\n'
        'from mmvim.ops import get_backend\n'
        'print(get_backend())'
    )
    return subprocess.run(
        [sys.executable, '-c', code],
        env={'PYTHONPATH': ':'.join(sys.path), 'PATH': '', 'MMVIM_BACKEND': choice},
        capture_output=True,
        text=True,
    )


def test_environment_variable_and_torch_alone():
    result = in_process('torch')
    assert result.stdout == 'torch\n', result.stderr
    result = in_process('gpu')
    assert result.returncode != 0
    assert "MMVIM_BACKEND must be one of ('auto', 'compiled', 'torch'), got 'gpu'" in result.stderr


@pytest.mark.usefixtures('everything_compiled')
def test_compiled_graphs_follow_the_choice():
    """A graph traced under one choice is not used under another."""
    x = randn(1, 5, 2, dtype=torch.float32)
    weight = torch.ones(2, 4)
    graphs = []

    def record(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if 'conv1d' in str(n.target)])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.causal_conv1d(x, weight), backend=record, fullgraph=True)
    for choice in ('torch', 'compiled', 'torch', 'compiled'):
        with use_backend(choice):
            compiled(x)
    assert graphs == [['mmvim_torch.causal_conv1d'], ['mmvim.causal_conv1d']]
    torch._dynamo.reset()

    def chooses_inside(x):
        with use_backend('torch'):
            x = ops.causal_conv1d(x, weight)
        return ops.causal_conv1d(x, weight)

    graphs.clear()
    torch.compile(chooses_inside, backend=record, fullgraph=True)(x)
    assert graphs == [['mmvim_torch.causal_conv1d', 'mmvim.causal_conv1d']]
    torch._dynamo.reset()
