"""causal_conv1d and mamba_ssm: functions, norms, the mixer."""

import copy
import io
import pickle
import threading
import typing

import loops
import pytest
import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, cpp_functions
from causal_conv1d.causal_conv1d_interface import CausalConv1dFn, causal_conv1d_ref
from mamba_ssm import Mamba
from mamba_ssm.models.mixer_seq_simple import _init_weights
from mamba_ssm.modules.block import Block as BlockWithMLP
from mamba_ssm.modules.mamba_simple import Block
from mamba_ssm.ops import selective_scan_interface as interface
from mamba_ssm.ops.triton import layer_norm, layernorm
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from naive_mamba import mixer as naive_mixer
from torch import nn

import mmvim.ops


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def agree(got, want, inputs, **tolerance):
    """Values, and the gradients of a fixed weighting of them."""
    torch.testing.assert_close(got, want, **tolerance)
    weighting = draw(*want.shape, seed=99)
    for grad, truth in zip(
        torch.autograd.grad((got * weighting).sum(), inputs, retain_graph=True),
        torch.autograd.grad((want * weighting).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(grad, truth, **tolerance)


def scan_tensors():
    tensors = [
        draw(2, 6, 9, seed=1),
        draw(2, 6, 9, seed=2),
        -draw(6, 3, seed=3).exp(),
        draw(2, 3, 9, seed=4),
        draw(2, 3, 9, seed=5),
        draw(6, seed=6),
        draw(2, 6, 9, seed=7),
        draw(6, seed=8),
    ]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize('name', ['selective_scan_fn', 'selective_scan_ref', 'SelectiveScanFn'])
def test_selective_scan(name):
    tensors = scan_tensors()
    function = getattr(interface, name)
    function = getattr(function, 'apply', function)
    want, _, last = loops.scan(*tensors, softplus=True)
    got, state = function(*tensors, True, True)
    assert got.is_contiguous()
    agree(got, want, tensors)
    agree(state, last, [t for i, t in enumerate(tensors) if i not in (4, 5, 6)])
    got = function(*tensors, delta_softplus=True)
    agree(got, want, tensors)


def test_any_a_is_accepted_as_in_mamba_ssm():
    u, delta, _, B, C, *_ = scan_tensors()
    A = 0.1 * draw(6, 3, seed=3).abs()
    torch.testing.assert_close(
        interface.selective_scan_fn(u, delta, A, B, C), loops.scan(u, delta, A, B, C)[0]
    )


def test_reference_takes_mixed_dtypes():
    tensors = scan_tensors()
    mixed = [t.to(torch.bfloat16 if i < 2 else torch.float32) for i, t in enumerate(tensors)]
    out = interface.selective_scan_ref(*mixed, True)
    assert out.dtype == torch.bfloat16
    want, *_ = loops.scan(*[t.double() for t in mixed], softplus=True)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


def inner_tensors():
    d, n, r = 6, 3, 2
    tensors = dict(
        xz=draw(2, 2 * d, 9, seed=1),
        conv1d_weight=draw(d, 1, 4, seed=2),
        conv1d_bias=draw(d, seed=3),
        x_proj_weight=draw(r + 2 * n, d, seed=4),
        delta_proj_weight=draw(d, r, seed=5),
        out_proj_weight=draw(5, d, seed=6),
        out_proj_bias=draw(5, seed=7),
        A=-draw(d, n, seed=8).exp(),
        A_b=-draw(d, n, seed=9).exp(),
        D=draw(d, seed=10),
        delta_bias=draw(d, seed=11),
        B_proj_bias=draw(n, seed=12),
        C_proj_bias=draw(n, seed=13),
    )
    return {k: v.requires_grad_() for k, v in tensors.items()}


def inner(t, both=False, project=True):
    x, z = t['xz'].chunk(2, 1)
    u = loops.conv(x, t['conv1d_weight'][:, 0], t['conv1d_bias'], silu=True)
    low = torch.einsum('bdl,rd->brl', u, t['x_proj_weight'])
    delta = torch.einsum('brl,dr->bdl', low[:, :2], t['delta_proj_weight'])
    B = low[:, 2:5] + t['B_proj_bias'][:, None]
    C = low[:, 5:] + t['C_proj_bias'][:, None]
    y, *_ = loops.scan(u, delta, t['A'], B, C, t['D'], z, t['delta_bias'], True)
    if both:
        flipped = [v.flip(-1) for v in (u, delta, B, C, z)]
        u, delta, B, C, z = flipped
        back, *_ = loops.scan(u, delta, t['A_b'], B, C, t['D'], z, t['delta_bias'], True)
        y = y + back.flip(-1)
    if not project:
        return y
    return F.linear(y.transpose(1, 2), t['out_proj_weight'], t['out_proj_bias'])


@pytest.mark.parametrize(
    ('name', 'both', 'project'),
    [
        ('mamba_inner_fn', False, True),
        ('mamba_inner_ref', False, True),
        ('mamba_inner_fn_no_out_proj', False, False),
        ('bimamba_inner_fn', True, True),
    ],
)
def test_inner_functions(name, both, project):
    tensors = inner_tensors()
    names = [
        k for k in tensors if (both or k != 'A_b') and (project or not k.startswith('out_proj'))
    ]
    given = {k: tensors[k] for k in names}
    want = inner(tensors, both, project)
    agree(getattr(interface, name)(**given), want, list(given.values()))
    # By position, with B and C derived.
    biases = 4
    *head, D, bias, b_bias, c_bias = given.values()
    assert len(given) == len(head) + biases
    got = getattr(interface, name)(*head, None, None, D, bias, b_bias, c_bias, True)
    torch.testing.assert_close(got, want)


def test_inner_function_with_given_matrices():
    tensors = inner_tensors()
    B, C = draw(6, 3, seed=20), draw(6, 3, seed=21)
    x, z = tensors['xz'].chunk(2, 1)
    u = loops.conv(x, tensors['conv1d_weight'][:, 0], tensors['conv1d_bias'], silu=True)
    weight = tensors['x_proj_weight'][:2]
    delta = torch.einsum(
        'brl,dr->bdl',
        torch.einsum('bdl,rd->brl', u, weight),
        tensors['delta_proj_weight'],
    )
    want, *_ = loops.scan(
        u, delta, tensors['A'], B, C, tensors['D'], z, tensors['delta_bias'], True
    )
    got = interface.mamba_inner_fn_no_out_proj(
        tensors['xz'],
        tensors['conv1d_weight'],
        tensors['conv1d_bias'],
        weight,
        tensors['delta_proj_weight'],
        tensors['A'],
        B,
        C,
        tensors['D'],
        tensors['delta_bias'],
    )
    torch.testing.assert_close(got, want)


def test_unsupported_arguments_of_inner_functions_are_named():
    tensors = inner_tensors()
    del tensors['A_b']
    with pytest.raises(ValueError, match='b_rms_weight must have shape'):
        interface.mamba_inner_fn(**tensors, b_rms_weight=tensors['D'])
    fewer = tensors | {'x_proj_weight': tensors['x_proj_weight'][:5], 'C': draw(6, 3)}
    with pytest.raises(ValueError, match='c_rms_weight does not go with a given C'):
        interface.mamba_inner_fn(**fewer, c_rms_weight=draw(3))
    with pytest.raises(ValueError, match='x_proj_weight'):
        interface.mamba_inner_fn(**tensors | {'x_proj_weight': tensors['x_proj_weight'][1:]})
    with pytest.raises(TypeError, match='A must be real'):
        interface.mamba_inner_fn(**tensors | {'A': tensors['A'].to(torch.complex64)})
    with pytest.raises(ValueError, match='xz must have'):
        interface.mamba_inner_fn(**tensors | {'xz': tensors['xz'].transpose(1, 2)})


@pytest.mark.parametrize('last', [False, True], ids=['time last', 'channels last'])
def test_causal_conv1d(last):
    x = draw(2, 5, 9)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if last else x
    tensors = [t.requires_grad_() for t in (x, draw(5, 4, seed=1), draw(5))]
    want = loops.conv(*tensors, silu=True)
    for got in (
        causal_conv1d_fn(*tensors, activation='silu'),
        causal_conv1d_fn(*tensors, 'swish'),
        causal_conv1d_fn(*tensors, None, 'silu'),
    ):
        agree(got, want, tensors)
        assert got.stride() == x.stride()
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1, 2, -1, -1], [3] * 8 + [4]])
    want = loops.conv(*tensors, seq_idx=seq_idx)
    agree(causal_conv1d_fn(*tensors, seq_idx=seq_idx), want, tensors)
    agree(causal_conv1d_ref(*tensors, seq_idx=seq_idx), want, tensors)
    state = draw(2, 5, 3)
    torch.testing.assert_close(
        causal_conv1d_ref(*tensors, state, True), causal_conv1d_fn(*tensors, None, state, True)
    )
    torch.testing.assert_close(causal_conv1d_ref(*tensors, 'silu'), got)
    with pytest.raises(ValueError, match='seq_idx must have shape'):
        causal_conv1d_fn(*tensors, seq_idx=seq_idx[:, 1:])
    with pytest.raises(ValueError, match='activation must be'):
        causal_conv1d_fn(*tensors, activation='gelu')


def test_states_of_packed_sequences():
    """Initial ones, as since causal_conv1d 1.7, belong to the first sequence; final ones follow."""
    x, weight, first = (draw(2, 5, 9), draw(5, 4, seed=1), draw(2, 5, 3, seed=2).requires_grad_())
    seq_idx = torch.tensor([[7] * 4 + [1] * 5, [-1] * 4 + [0] * 5])
    out, last = causal_conv1d_fn(x, weight, None, seq_idx, first, True)
    torch.testing.assert_close(last, x[..., -3:])
    fresh, going_on = (
        causal_conv1d_fn(part, weight, initial_states=state)
        for part, state in ((x[..., 4:], None), (x[:1, :, :4], first[:1]))
    )
    want = torch.cat([torch.cat([going_on, torch.zeros(1, 5, 4)]), fresh], -1)
    agree(out, want, [first])


def test_packed_sequences_do_not_see_each_other():
    x, weight = draw(1, 5, 9), draw(5, 4, seed=1)
    packed = causal_conv1d_fn(x, weight, seq_idx=torch.tensor([[0] * 4 + [1] * 5]))
    apart = [causal_conv1d_fn(part, weight) for part in x.split([4, 5], -1)]
    torch.testing.assert_close(packed, torch.cat(apart, -1))


@pytest.mark.parametrize('name', ['selective_scan_fn', 'selective_scan_ref'])
def test_scans_of_packed_sequences(name):
    u, delta, z = (draw(1, 4, 9, seed=i) for i in range(3))
    A = -draw(4, 3, seed=3).exp()
    B, C = (draw(1, 3, 9, seed=i) for i in (4, 5))
    seq_idx = torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)

    def scan(u, delta, B, C, z, **options):
        return getattr(interface, name)(u, delta, A, B, C, z=z, delta_softplus=True, **options)

    inputs = u, delta, B, C, z
    apart = [scan(*parts) for parts in zip(*(x.split([4, 5], -1) for x in inputs), strict=True)]
    torch.testing.assert_close(scan(*inputs, seq_idx=seq_idx), torch.cat(apart, -1))


def test_causal_conv1d_update():
    x, weight, bias = draw(2, 5, 6), draw(5, 3, seed=1), draw(5)
    state = torch.zeros(2, 5, 2, dtype=torch.float64)
    columns = [causal_conv1d_update(x[..., t], state, weight, bias, 'silu') for t in range(6)]
    torch.testing.assert_close(torch.stack(columns, -1), loops.conv(x, weight, bias, silu=True))


@pytest.mark.parametrize('heads', [False, True])
@pytest.mark.parametrize('indexed', [False, True])
def test_selective_state_update(heads, indexed):
    n = 3
    axes = (4, 2) if heads else (8,)
    state = draw(5 if indexed else 2, *axes, n)
    rows = torch.tensor([3, 1]) if indexed else torch.arange(2)
    x, dt, z = (draw(2, *axes, seed=i) for i in (1, 2, 3))
    A, D, bias = -draw(*axes, n, seed=4).exp(), draw(*axes, seed=5), draw(*axes, seed=6)
    B, C = (draw(2, 2, n, seed=i) if heads else draw(2, n, seed=i) for i in (7, 8))
    before, step = state.clone(), F.softplus(dt + bias)[..., None]
    wide_B, wide_C = (
        t.repeat_interleave(2, 1)[:, :, None] if heads else t[:, None] for t in (B, C)
    )
    want_state = torch.exp(step * A) * before[rows] + step * wide_B * x[..., None]
    want = ((want_state * wide_C).sum(-1) + D * x) * F.silu(z)
    out = selective_state_update(
        state, x, dt, A, B, C, D, z, bias, True, rows.int() if indexed else None
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state[rows], want_state)
    if indexed:
        torch.testing.assert_close(state[[0, 2, 4]], before[[0, 2, 4]])
    with pytest.raises(ValueError, match='dt must have shape'):
        selective_state_update(state[:2], x, dt[:1], A, B, C)
    for bad in (rows - 2, rows + 3):
        with pytest.raises(ValueError, match='state_batch_indices must be rows of state'):
            selective_state_update(state, x, dt, A, B, C, state_batch_indices=bad)


@pytest.mark.parametrize('module', [layernorm, layer_norm])
@pytest.mark.parametrize('rms', [True, False])
@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('with_residual', [True, False])
def test_norms(module, rms, with_bias, with_residual):
    x, weight = draw(2, 4, 6).requires_grad_(), draw(6, seed=1).requires_grad_()
    bias = draw(6, seed=2).requires_grad_() if with_bias else None
    residual = draw(2, 4, 6, seed=3).requires_grad_() if with_residual else None
    function = module.rms_norm_fn if rms else module.layer_norm_fn
    total = x if residual is None else x + residual
    centred = total if rms else total - total.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-4).sqrt() * weight
    want = want if bias is None else want + bias
    options = dict(residual=residual, eps=1e-4)
    given = [t for t in (x, weight, bias, residual) if t is not None]
    agree(function(x, weight, bias, **options), want, given)
    out, kept = function(x, weight, bias, prenorm=True, residual_in_fp32=True, **options)
    agree(out, want, given)
    torch.testing.assert_close(kept, total)


def test_dtype_of_the_residual_stream():
    """Of the residual if there is one, else as asked for."""
    x, weight = draw(2, 6, dtype=torch.bfloat16), torch.ones(6)
    for residual, asked, dtype in (
        (None, True, torch.float32),
        (None, False, torch.bfloat16),
        (x, True, torch.bfloat16),
        (x.float(), False, torch.float32),
    ):
        with torch.autocast('cpu', dtype=torch.float16):
            out, kept = layernorm.rms_norm_fn(x, weight, None, residual, True, asked)
        assert out.dtype == torch.bfloat16
        assert kept.dtype == dtype


def test_norm_module_and_unsupported_arguments():
    norm = layernorm.RMSNorm(6, eps=1e-4)
    assert layer_norm.RMSNorm is layernorm.RMSNorm
    assert norm.bias is None
    assert list(norm.state_dict()) == ['weight']
    x = draw(2, 6, dtype=torch.float32)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), eps=1e-4))
    assert len(norm(x, x, prenorm=True, residual_in_fp32=True)) == 2
    for name, value in (('x1', x), ('dropout_p', 0.1), ('rowscale', x), ('weight1', x)):
        with pytest.raises(NotImplementedError, match=name):
            layer_norm.layer_norm_fn(x, norm.weight, None, **{name: value})


KINDS = {
    'none': (dict(), 'none', 'sum'),
    'v1': (dict(bimamba_type='v1'), 'v1', 'sum'),
    'v2': (dict(bimamba_type='v2'), 'v2', 'sum'),
    'v2 mean': (dict(bimamba_type='v2', if_divide_out=True), 'v2', 'mean'),
    'typo': (dict(bimamba_type='v2', if_devide_out=True), 'v2', 'mean'),
    'videomamba': (dict(bimamba=True), 'v2', 'sum'),
    'scaled': (dict(bimamba_type='v2', init_layer_scale=0.3), 'v2', 'sum'),
}


@pytest.mark.parametrize('use_fast_path', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_mixer_against_loops(kind, use_fast_path):
    options, bimamba, merge = KINDS[kind]
    torch.manual_seed(0)
    layer = Mamba(8, d_state=3, use_fast_path=use_fast_path, layer_idx=1, **options)
    x = draw(2, 7, 8, dtype=torch.float32)
    out = layer(x)
    exact = {k: v.detach().double().requires_grad_() for k, v in layer.state_dict().items()}
    want = naive_mixer(exact, x.double(), bimamba, merge)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    truth = torch.autograd.grad(want.square().sum(), list(exact.values()))
    grads = torch.autograd.grad(
        out.square().sum(), [dict(layer.named_parameters())[name] for name in exact]
    )
    for name, grad, true in zip(exact, grads, truth, strict=True):
        assert (grad.double() - true).norm() <= 1e-4 * true.norm(), name


def test_scan_across_slices():
    """SegMamba's third direction: its own parameters on the steps of all slices in turns."""
    layer = Mamba(8, d_state=3, bimamba_type='v3', nslices=3)
    both, slices = Mamba(8, d_state=3, bimamba_type='v2'), Mamba(8, d_state=3)
    state = layer.state_dict()
    assert set(state) == set(both.state_dict()) | {
        k.replace('_b', '_s') for k in both.state_dict() if '_b' in k
    }
    both.load_state_dict({k: v for k, v in state.items() if '_s' not in k})
    own = {k.replace('_s', ''): v for k, v in state.items() if '_s' in k}
    slices.load_state_dict(own | {k: state[k] for k in ('in_proj.weight', 'out_proj.weight')})
    x = draw(2, 12, 8, dtype=torch.float32)
    order = torch.arange(12).view(3, 4).t().flatten()
    want = both(x) + slices(x[:, order])[:, order.argsort()]
    torch.testing.assert_close(layer(x), want)


def test_names_that_the_module_of_the_mixer_imports():
    einops = pytest.importorskip('einops')
    everything = {}
    exec('from mamba_ssm.modules.mamba_simple import *', everything)
    for name, value in (
        ('causal_conv1d_fn', causal_conv1d_fn),
        ('causal_conv1d_update', causal_conv1d_update),
        ('selective_scan_fn', interface.selective_scan_fn),
        ('mamba_inner_fn', interface.mamba_inner_fn),
        ('RMSNorm', layer_norm.RMSNorm),
        ('selective_state_update', selective_state_update),
        ('Mamba', Mamba),
        ('rearrange', einops.rearrange),
        ('repeat', einops.repeat),
        ('Optional', typing.Optional),
        ('nn', nn),
        ('F', F),
    ):
        assert everything[name] is value, name


def test_state_dict_keys_and_marks():
    own = ['A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight']
    own += ['dt_proj.weight', 'dt_proj.bias', 'out_proj.weight']
    second = ['conv1d_b.weight', 'conv1d_b.bias', 'x_proj_b.weight', 'dt_proj_b.weight']
    second += ['dt_proj_b.bias', 'A_b_log', 'D_b']
    keys = {kind: set(Mamba(16, bimamba_type=kind).state_dict()) for kind in ('none', 'v1', 'v2')}
    assert keys == {
        'none': set(own),
        'v1': {*own, 'A_b_log'},
        'v2': {*own, *second},
    }
    layer = Mamba(16, bimamba_type='v2')
    shapes = {k: tuple(v.shape) for k, v in layer.state_dict().items()}
    assert shapes['conv1d.weight'] == (32, 1, 4)
    assert shapes['x_proj.weight'] == (33, 32)
    assert layer.A_log._no_weight_decay
    assert layer.D_b._no_weight_decay
    assert layer.dt_proj.bias._no_reinit
    # Re-initialisation by class reaches all of them, as it does in VideoMamba.
    assert sum(isinstance(m, nn.Linear) for m in layer.modules()) == 6
    assert sum(isinstance(m, nn.Conv1d) for m in layer.modules()) == 2
    step = F.softplus(layer.dt_proj.bias)
    assert 0.0009 < step.min() < step.max() < 0.11


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match='bimamba_type'):
        Mamba(8, bimamba_type='v4')
    with pytest.raises(TypeError, match='nslice'):
        Mamba(8, nslice=5)
    with pytest.raises(ValueError, match='nslices=5 must divide the length of the sequence, 9'):
        Mamba(8, bimamba_type='v3')(torch.zeros(2, 9, 8))
    with pytest.raises(ValueError, match='hidden_states'):
        Mamba(8)(torch.zeros(2, 9))
    with pytest.raises(ValueError, match='inference_params needs one direction'):
        Mamba(8, bimamba_type='v2', layer_idx=0)(
            torch.zeros(1, 2, 8), inference_params=InferenceParams(4, 1)
        )
    with pytest.raises(ValueError, match='layer_idx'):
        Mamba(8)(torch.zeros(1, 2, 8), inference_params=InferenceParams(4, 1))


def test_steps_continue_a_sequence():
    layer = Mamba(8, layer_idx=0)
    x, states = draw(2, 9, 8, dtype=torch.float32), InferenceParams(9, 2)
    with torch.no_grad():
        parts = [layer(x[:, :2], inference_params=states)]
        for t in range(2, 9):
            states.seqlen_offset = t
            parts.append(layer(x[:, t : t + 1], inference_params=states))
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))


def test_adapters_in_place_of_projections_are_called():
    layer = Mamba(8, bimamba_type='v2')
    x = draw(2, 5, 8, dtype=torch.float32)
    before = layer(x)
    layer.out_proj = nn.Sequential(layer.out_proj, nn.Linear(8, 8))
    torch.testing.assert_close(layer(x), layer.out_proj[1](before))


def test_copies_pickles_and_threads():
    layer = Mamba(8, bimamba_type='v2')
    x = draw(2, 5, 8, dtype=torch.float32)
    want = layer(x)
    assert type(layer).__module__ == 'mamba_ssm.modules.mamba_simple'
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(other(x), want)
    results = []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, want)


@pytest.mark.parametrize('kind', ['none', 'v1', 'v2'])
def test_compiled_without_graph_breaks(kind):
    layer = Mamba(8, bimamba_type=kind)
    x = draw(2, 5, 8, dtype=torch.float32)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    grads = [torch.autograd.grad(f(x).sum(), list(layer.parameters())) for f in (layer, compiled)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_autocast():
    layer = Mamba(16, bimamba_type='v2', if_divide_out=True)
    x = draw(2, 5, 16, dtype=torch.float32)
    want = layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=5e-2, atol=1e-2)


def test_what_is_missing_can_be_imported_and_raises_when_it_is_used():
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
    from mamba_ssm import Mamba2
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules.mamba2 import Mamba2 as SameName
    from mamba_ssm.modules.ssd_minimal import segsum
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan
    from mamba_ssm.utils.generation import decode
    from mamba_ssm.utils.hf import load_config_hf

    class Model(Mamba2):
        pass

    for use in (
        Mamba2,
        SameName,
        Model,
        MambaConfig,
        MambaLMHeadModel.from_pretrained,
        causal_conv1d_varlen_states,
        segsum,
        mamba_chunk_scan,
        decode,
        load_config_hf,
        GenerationMixin().generate,
    ):
        with pytest.raises(NotImplementedError, match='pip install') as error:
            use()
        package = 'causal-conv1d' if use is causal_conv1d_varlen_states else 'mamba-ssm'
        assert f'--no-build-isolation {package};' in str(error.value)
    assert not isinstance(Mamba(8), Mamba2)


def test_functions_are_found_where_the_package_has_them():
    """transformers searches mamba_ssm for a function before it goes to the module that has it."""
    import mamba_ssm

    for name in ('selective_state_update', 'mamba_chunk_scan_combined', 'anything'):
        assert not hasattr(mamba_ssm, name)
    module = mamba_ssm.ops.triton.selective_state_update
    assert module.selective_state_update is selective_state_update
    einops = pytest.importorskip('einops')
    assert interface.rearrange is einops.rearrange
    assert CausalConv1dFn.apply is causal_conv1d_fn


@pytest.mark.parametrize('flag', [None, False, 0, True, 1])
def test_flags_are_truth_values(flag):
    """MambaVision passes None for return_last_state."""
    tensors = scan_tensors()
    out = interface.selective_scan_fn(*tensors, delta_softplus=flag, return_last_state=flag)
    assert isinstance(out, tuple) == bool(flag)
    same = mmvim.ops.selective_scan_fn(*tensors, delta_softplus=flag, return_last_state=flag)
    torch.testing.assert_close(same, out)
    x, weight = draw(2, 5, 9), draw(5, 4)
    for function in (causal_conv1d_fn, mmvim.ops.causal_conv1d_fn):
        assert isinstance(function(x, weight, return_final_states=flag), tuple) == bool(flag)
    assert isinstance(layernorm.rms_norm_fn(x, draw(9), None, prenorm=flag), tuple) == bool(flag)
    with pytest.raises(TypeError, match='return_last_state must be True or False'):
        interface.selective_scan_fn(*tensors, return_last_state='no')


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_inner_function_with_norms_of_the_matrices():
    t = inner_tensors()
    del t['A_b']
    t |= {f'{k}_rms_weight': draw(n, seed=n) for k, n in (('b', 3), ('c', 3), ('dt', 6))}
    x, z = t['xz'].chunk(2, 1)
    u = loops.conv(x, t['conv1d_weight'][:, 0], t['conv1d_bias'], silu=True)
    low = torch.einsum('bdl,rd->blr', u, t['x_proj_weight'])
    delta = rms(low[..., :2] @ t['delta_proj_weight'].t(), t['dt_rms_weight'], 1e-4)
    B = rms(low[..., 2:5] + t['B_proj_bias'], t['b_rms_weight'], 1e-4)
    C = rms(low[..., 5:] + t['C_proj_bias'], t['c_rms_weight'], 1e-4)
    matrices = (v.transpose(1, 2) for v in (delta, B, C))
    delta, B, C = matrices
    y, *_ = loops.scan(u, delta, t['A'], B, C, t['D'], z, t['delta_bias'], True)
    want = F.linear(y.transpose(1, 2), t['out_proj_weight'], t['out_proj_bias'])
    agree(interface.mamba_inner_fn(**t, b_c_dt_rms_eps=1e-4), want, [t['xz'], t['A']])


@pytest.mark.parametrize('norm', [nn.LayerNorm, layernorm.RMSNorm])
@pytest.mark.parametrize('fused', [True, False])
def test_block(norm, fused):
    block = Block(8, Mamba, norm, fused_add_norm=fused, residual_in_fp32=True)
    x, residual = draw(2, 5, 8, dtype=torch.float32), draw(2, 5, 8, seed=1, dtype=torch.float32)
    for before, total in ((None, x), (residual, x + residual)):
        out, after = block(x, before)
        torch.testing.assert_close(after, total)
        torch.testing.assert_close(out, block.mixer(block.norm(total)))
    states = block.allocate_inference_cache(2, 9)
    assert [tuple(s.shape) for s in states] == [(2, 16, 4), (2, 16, 16)]
    with pytest.raises(ValueError, match='norm_cls=Identity'):
        Block(8, Mamba, nn.Identity, fused_add_norm=True)
    both = BlockWithMLP(8, Mamba, lambda d: nn.Linear(d, d), norm, fused, residual_in_fp32=True)
    out, after = both(x, residual)
    total = x + residual + both.mixer(both.norm(x + residual))
    torch.testing.assert_close(after, total)
    torch.testing.assert_close(out, both.mlp(both.norm2(total)))
    assert BlockWithMLP(8, Mamba, nn.Identity).mlp is None


def test_initialisation_of_a_model():
    model = nn.Sequential(Mamba(64, bias=True), nn.Embedding(500, 64))
    step = model[0].dt_proj.bias.clone()
    model.apply(lambda module: _init_weights(module, n_layer=16))
    assert not model[0].in_proj.bias.any()
    torch.testing.assert_close(model[0].dt_proj.bias, step)
    assert 0.019 < model[1].weight.std() < 0.021
    bound = 128**-0.5 / 4
    assert 0.9 * bound < model[0].out_proj.weight.abs().max() <= bound


def test_functions_around_the_compiled_ones():
    x, weight, bias = (t.requires_grad_() for t in (draw(2, 5, 9), draw(5, 4, seed=1), draw(5)))
    want = loops.conv(x, weight, bias, silu=True)
    none = (None,) * 3
    out = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, *none, True)
    torch.testing.assert_close(out, want.detach())
    dout = draw(2, 5, 9, seed=2)
    dx = torch.full_like(x, torch.nan).detach()
    *grads, initial = cpp_functions.causal_conv1d_bwd_function(
        x.detach(), weight, bias, dout, *none, dx, False, True
    )
    assert initial is None
    assert grads[0] is dx
    for grad, true in zip(grads, torch.autograd.grad(want, (x, weight, bias), dout), strict=True):
        torch.testing.assert_close(grad.detach(), true)
    state = torch.zeros(2, 5, 4, dtype=torch.float64)
    columns = [
        cpp_functions.causal_conv1d_update_function(x[..., t], state, weight, bias, True)
        for t in range(9)
    ]
    torch.testing.assert_close(torch.stack(columns, -1), want.detach())
