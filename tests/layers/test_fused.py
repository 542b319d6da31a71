"""Mixers as one op equal mixers step by step, and keep less."""

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mmvim.layers import SS2D, BiMamba, Mamba, MambaBlock, MambaStack, MambaVisionMixer, Mlp
from mmvim.layers.drop import _on_device, drawn_together, factors_of
from mmvim.layers.fusion import Fusable
from mmvim.layers.patch_embed import _matrix_product
from mmvim.models.backbones.vmamba import VSSBlock
from mmvim.ops import DISCRETIZATIONS, backend_info, intercept_ops, use_backend
from mmvim.ops.mixer import mixer_stack


class Block(MambaBlock):
    """A block with its residual and its factors of samples, and one output."""

    def __init__(self, *args, first=False, keep=True, **options):
        options.setdefault('bidirectional', 'v2')
        super().__init__(*args, **options)
        self.first, self.keep = first, keep

    def forward(self, x):
        keep = (2 * (torch.arange(len(x), device=x.device) != 1)).to(x.dtype)
        hidden, stream = super().forward(
            x,
            None if self.first else x.sin(),
            keep=keep.view(-1, 1, 1) if self.keep else None,
        )
        return hidden + stream


def make(dtype=torch.float64, kind=BiMamba, **options):
    torch.manual_seed(0)
    mixer = kind(12, d_state=3, dt_rank=2, **options).to(dtype)
    return moved(mixer)


def moved(mixer):
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def run(mixer, x, autocast=None):
    """Output and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    device = x.device.type
    with torch.autocast(device, autocast) if autocast else contextlib.nullcontext():
        y = mixer(x)
    y.to(x.dtype).pow(3).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in mixer.named_parameters()}


@pytest.fixture
def compiled():
    """The op, which is compiled code or nothing, whatever MMVIM_BACKEND says."""
    if not backend_info()['loaded']:
        pytest.skip('no compiled library')
    with use_backend('compiled'):
        yield


def op_arguments(mixer, x, interval=16, recompute=True):
    """The arguments that the layer passes to the op."""
    with (
        mock.patch('mmvim.layers.mamba.mixer', side_effect=InterruptedError) as called,
        pytest.raises(InterruptedError),
    ):
        mixer(x)
    x, parameters, *options, _, norm = called.call_args.args
    weight, residual, keep, eps, residual_in_fp32 = norm or (None, None, None, 0.0, False)
    return (
        x,
        residual,
        keep,
        (*parameters, weight),
        *options,
        recompute,
        eps,
        residual_in_fp32,
        interval,
    )


@contextlib.contextmanager
def step_by_step(mixer):
    modules = [module for module in mixer.modules() if isinstance(module, Fusable)]
    try:
        for module in modules:
            module.fused = False
        yield
    finally:
        for module in modules:
            module.fused = True


KINDS = [BiMamba, Mamba, MambaVisionMixer, Block]
OPTIONS = [
    {},
    {'merge': 'sum', 'bias': True, 'conv_bias': False},
    {'reverse': True, 'layer_scale': 0.3},
    {'discretization': 'foh_hold', 'd_conv': 2},
    {'bimamba': 'v1'},
    {'bimamba': 'v1', 'reverse': True, 'merge': 'mean', 'bias': True},
    {'kind': Mamba},
    {'kind': Mamba, 'reverse': True, 'bias': True, 'conv_bias': False},
    {'kind': MambaVisionMixer},
    {'kind': MambaVisionMixer, 'double_dt_bias': False, 'dt_init': 'proper'},
    {'kind': Block},
    {'kind': Block, 'first': True, 'keep': False, 'bias': True, 'layer_scale': 0.3},
    {'kind': Block, 'bidirectional': 'v1', 'keep': False, 'residual_in_fp32': False},
    {'kind': Block, 'bidirectional': None, 'first': True, 'norm_eps': 0.1},
]


@pytest.mark.parametrize('backend', ['auto', 'torch'])
@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('options', OPTIONS)
def test_equals_step_by_step(options, recompute, backend):
    mixer = make(recompute=recompute, ops_backend=backend, **options)
    x = torch.randn(2, 37, 12, dtype=torch.float64)
    y, dx, grads = run(mixer, x)
    with step_by_step(mixer):
        expected_y, expected_dx, expected = run(mixer, x)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-10, atol=1e-12)
    assert grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('discretization', DISCRETIZATIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_every_discretization(kind, discretization):
    mixer = make(kind=kind, discretization=discretization, recompute=True)
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    _, dx, grads = run(mixer, x)
    with step_by_step(mixer):
        _, expected_dx, expected = run(mixer, x)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-10, atol=1e-12)
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('options', OPTIONS)
def test_without_a_gradient_equals_step_by_step(options, autocast):
    dtype = torch.float32 if autocast else torch.float64
    mixer, x = make(dtype, **options), torch.randn(2, 37, 12, dtype=dtype)
    with torch.no_grad(), torch.autocast('cpu', autocast, enabled=autocast is not None):
        y = mixer(x)
        with step_by_step(mixer):
            expected = mixer(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('kind', KINDS)
def test_tracers_see_the_modules(kind, monkeypatch):
    mixer, x = make(kind=kind).eval(), torch.randn(2, 9, 12, dtype=torch.float64)
    monkeypatch.delattr('mmvim.layers.mamba.mixer')
    with torch.no_grad():
        for traced in (
            torch.jit.trace(mixer, (x,), check_trace=False),
            torch.compile(mixer, backend='eager', fullgraph=True),
            torch.export.export(mixer, (x,), strict=False).module(),
        ):
            assert traced(x).shape == x.shape
        with pytest.raises(NameError):
            mixer(x)


@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', KINDS)
def test_error_in_low_precision(kind, dtype, recompute):
    """At most twice the error of the steps, against float64."""
    x = torch.randn(2, 50, 12)
    _, *exact = run(make(kind=kind), x.double())
    mixer = make(torch.float32, kind, recompute=recompute)
    _, *fused = run(mixer, x, dtype)
    with step_by_step(mixer):
        _, *steps = run(mixer, x, dtype)

    def error(found, name=None):
        dx, grads = found
        wrong, right = (dx, exact[0]) if name is None else (grads[name], exact[1][name])
        return ((wrong.double() - right).norm() / right.norm()).item()

    for name in (None, *exact[1]):
        assert error(fused, name) <= 2 * error(steps, name) + 1e-3, name


@pytest.mark.parametrize('length', [0, 1])
def test_short_sequences(length):
    y, dx, grads = run(make(recompute=True), torch.randn(2, length, 12, dtype=torch.float64))
    assert y.shape == dx.shape == (2, length, 12)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_frozen_parameters_have_no_gradient():
    mixer = make(recompute=True)
    mixer.x_proj.requires_grad_(False)
    mixer.A_log.requires_grad_(False)
    _, dx, grads = run(mixer, torch.randn(1, 9, 12, dtype=torch.float64))
    assert {name for name, grad in grads.items() if grad is None} == {'x_proj.weight', 'A_log'}
    assert torch.isfinite(dx).all()


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('kind', KINDS)
def test_a_frozen_mixer_keeps_nothing(kind):
    mixer, x = make(kind=kind), torch.randn(1, 40, 12, dtype=torch.float64)
    expected = mixer(x).detach()
    mixer.requires_grad_(False)
    y = mixer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        *_, kept = torch.ops.mmvim.mixer(*op_arguments(mixer, x, interval=0))
    assert kept == []


def kept_bytes(mixer, x):
    """Bytes that autograd keeps between forward and backward, parameters not counted."""
    own = {parameter.data_ptr() for parameter in mixer.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixer(x.requires_grad_())
    return sum(kept.values())


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize(
    ('kind', 'share'), [(BiMamba, 0.5), (Mamba, 0.6), (MambaVisionMixer, 0.7), (Block, 0.6)]
)
def test_recomputation_keeps_less(kind, share):
    x = torch.randn(2, 256, 64)
    lean, full = (kept_bytes(kind(64, recompute=flag), x) for flag in (True, False))
    assert lean < share * full


def test_what_is_put_around_a_part_is_called():
    mixer = make()
    calls = []
    mixer.x_proj_b.register_forward_hook(lambda *_: calls.append('hook'))
    mixer(torch.randn(1, 5, 12, dtype=torch.float64))
    assert calls == ['hook']

    class Adapter(nn.Linear):
        def forward(self, x):
            calls.append('adapter')
            return super().forward(x)

    mixer = make()
    mixer.out_proj = Adapter(24, 12, bias=False).double()
    mixer(torch.randn(1, 5, 12, dtype=torch.float64))
    assert calls == ['hook', 'adapter']


@pytest.mark.parametrize('kind', KINDS)
def test_intercepted_ops_are_called(kind):
    calls = []

    def counted(op, *args):
        calls.append(op)
        return op(*args)

    mixer, x = make(kind=kind), torch.randn(1, 5, 12, dtype=torch.float64)
    scan = 'bidirectional_scan' if kind in (BiMamba, Block) else 'selective_scan'
    with intercept_ops(**{scan: counted}):
        mixer(x)
    assert len(calls) == 1


def test_compiles_in_one_graph():
    mixer, x = make(recompute=True), torch.randn(2, 9, 12, dtype=torch.float64)
    _, dx, grads = run(mixer, x)
    compiled = torch.compile(mixer, backend='aot_eager', fullgraph=True)
    mixer.zero_grad()
    inputs = x.clone().requires_grad_()
    compiled(inputs).pow(3).sum().backward()
    torch.testing.assert_close(inputs.grad, dx)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('kind', [BiMamba, MambaVisionMixer, Mlp])
def test_a_compiler_meets_the_fused_function_where_there_is_a_gradient(kind):
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    module = kind(12, 24) if kind is Mlp else kind(12)
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(1, 5, 12))
    wanted = 'autograd_function' if kind is Mlp else 'mmvim.mixer'
    assert any(wanted in target for target in targets)


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize(('dtype', 'recompute'), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize('options', OPTIONS)
def test_opcheck(options, dtype, recompute):
    mixer = make(torch.float32, **options)
    x = torch.randn(2, 9, 12, dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        torch.ops.mmvim.mixer.default, op_arguments(mixer, x, recompute=recompute)
    )


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize('given', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('options', OPTIONS)
def test_results_lie_apart_and_are_as_the_fake_kernels_say(options, given, recompute):
    def on_meta(tensors):
        return [None if t is None else t.to('meta') for t in tensors]

    def check(results, fakes):
        for real, fake in zip(results, fakes, strict=True):
            assert real.shape == fake.shape
            assert real.dtype == fake.dtype
            assert real.stride() == fake.stride()
        places = sorted((t.data_ptr(), t.nbytes) for t in results if t.numel())
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))

    mixer = make(given, **options)
    for dtype in {torch.bfloat16, given}:
        arguments = op_arguments(mixer, torch.randn(2, 37, 12), recompute=recompute)
        x, residual, keep, parameters, *rest = arguments
        x, keep = x.to(dtype), None if keep is None else keep.to(dtype)
        has_norm = parameters[-1] is not None
        with torch.no_grad():
            out, stream, kept = torch.ops.mmvim.mixer(x, residual, keep, parameters, *rest)
            fake_out, fake_stream, fake_kept = torch.ops.mmvim.mixer(
                *on_meta((x, residual, keep)), on_meta(parameters), *rest
            )
            check([out, stream, *kept], [fake_out, fake_stream, *fake_kept])
            given = (None, x, None) if not has_norm else (torch.ones_like(stream), None, stream)
            rest.append(None if residual is None else residual.dtype)
            for needed in (2**21 - 1, 0b1000, 0b1010101, 2**20, 2**19):
                grads = torch.ops.mmvim.mixer_backward(
                    torch.ones_like(out), *given, keep, parameters, kept, *rest, needed
                )
                fakes = torch.ops.mmvim.mixer_backward(
                    fake_out,
                    *on_meta((*given, keep)),
                    on_meta(parameters),
                    fake_kept,
                    *rest,
                    needed,
                )
                check(grads, fakes)


@pytest.mark.parametrize('kind', KINDS)
def test_only_what_is_needed(kind):
    """Whatever is frozen, the other gradients are what they were."""
    mixer, x = make(kind=kind), torch.randn(1, 9, 12, dtype=torch.float64)
    _, _, expected = run(mixer, x)
    for trained in expected:
        mixer.zero_grad()
        for name, parameter in mixer.named_parameters():
            parameter.requires_grad_(name == trained)
        mixer(x).pow(3).sum().backward()
        grads = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
        assert grads.keys() == {trained}
        torch.testing.assert_close(grads[trained], expected[trained], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant):
    mixer, x = make(recompute=True), torch.randn(2, 9, 12, dtype=torch.float64)
    _, dx, grads = run(mixer, x)
    checkpointed = functools.partial(checkpoint, mixer, use_reentrant=use_reentrant)
    mixer.zero_grad()
    inputs = x.clone().requires_grad_()
    checkpointed(inputs).pow(3).sum().backward()
    torch.testing.assert_close(inputs.grad, dx, rtol=0, atol=0)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=0)


@pytest.mark.usefixtures('compiled')
def test_second_derivatives_are_refused():
    mixer, x = make(), torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(mixer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='derivative for mmvim::mixer_backward'):
        dx.sum().backward()


def test_a_parameter_that_changed_before_backward_is_noticed():
    mixer, x = make(), torch.randn(1, 5, 12, dtype=torch.float64)
    y = mixer(x)
    with torch.no_grad():
        mixer.out_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


@pytest.mark.parametrize('kind', KINDS)
def test_changed_parameters_count_at_once(kind):
    """In whatever way they change."""
    mixer, x = make(torch.float32, kind).eval(), torch.randn(1, 5, 12)
    other = moved(copy.deepcopy(mixer))

    def swap():
        for a, b in zip(mixer.parameters(), other.parameters(), strict=True):
            kept = a.data.clone()
            a.data.copy_(b.data)
            b.data.copy_(kept)

    for change in (
        lambda: getattr(mixer, 'mixer', mixer).A_log.data.add_(0.5),
        lambda: mixer.load_state_dict(other.state_dict()),
        lambda: moved(mixer),
        swap,
        lambda: mixer.bfloat16().float(),
    ):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                change()
                y = mixer(x)
                with step_by_step(mixer):
                    torch.testing.assert_close(y, mixer(x), rtol=0, atol=1e-6)


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize(
    ('position', 'wrong', 'message'),
    [
        (0, torch.zeros(2, 12), 'x must be \\(batch, length, channels\\)'),
        (0, torch.zeros(1, 2, 13), 'in_weight must have shape'),
        (1, torch.zeros(1, 2, 12), 'residual and keep are for a mixer with a norm'),
        (2, torch.zeros(1), 'residual and keep are for a mixer with a norm'),
        (3, [torch.zeros(2, 2)] * 5, 'there must be 19 parameters'),
        (3, [None] * 19, 'parameter 0 is missing'),
        (4, 'v3', "kind must be 'one', 'v1', 'v2' or 'half', got 'v3'"),
        (8, 'euler', 'discretization must be one of'),
    ],
)
def test_wrong_arguments(position, wrong, message):
    arguments = list(op_arguments(make(torch.float32), torch.zeros(1, 2, 12)))
    arguments[position] = wrong
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.mmvim.mixer(*arguments)


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('index', [i for i in range(19) if i not in (1, 3)])
def test_wrong_parameters(index):
    x, residual, keep, parameters, *rest = op_arguments(
        make(torch.float32, Block), torch.zeros(1, 2, 12)
    )
    parameters = list(parameters)
    parameters[index] = torch.zeros(5, 7)
    with torch.no_grad(), pytest.raises(ValueError, match=r'must have shape|must be'):
        torch.ops.mmvim.mixer(x, residual, keep, parameters, *rest)


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize(
    ('position', 'wrong', 'message'),
    [
        (1, torch.zeros(1, 2, 13), 'residual must have shape'),
        (2, torch.zeros(3), 'keep must have shape'),
        (2, torch.zeros(1, dtype=torch.int), 'keep must be'),
    ],
)
def test_wrong_stream(position, wrong, message):
    arguments = list(op_arguments(make(torch.float32, Block), torch.zeros(1, 2, 12)))
    arguments[position] = wrong
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
        torch.ops.mmvim.mixer(*arguments)


@pytest.mark.parametrize('used', ['hidden', 'stream'])
@pytest.mark.parametrize('learns', ['x', 'residual', 'both', 'neither'])
def test_parts_of_a_block(used, learns):
    """Whichever output is used, and whatever has a gradient."""
    torch.manual_seed(0)
    block = moved(MambaBlock(12, 'v2', d_state=3, dt_rank=2).double())
    given = torch.randn(2, 2, 9, 12, dtype=torch.float64)

    def gradients():
        x, residual = (t.clone() for t in given)
        x.requires_grad_(learns in ('x', 'both'))
        residual.requires_grad_(learns in ('residual', 'both'))
        block.zero_grad()
        hidden, stream = block(x, residual, keep=x.new_tensor([0.5, 2.0]).view(-1, 1, 1))
        (hidden if used == 'hidden' else stream).pow(3).sum().backward()
        # Of what the stream does not depend on there is none, or zero.
        tensors = x, residual, *block.parameters()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]

    if used == 'stream' and learns == 'neither':
        return
    found = gradients()
    with step_by_step(block):
        torch.testing.assert_close(found, gradients(), rtol=1e-10, atol=1e-12)


def test_a_block_calls_what_is_hooked():
    calls = []
    for part in ('norm', 'mixer'):
        block = MambaBlock(12, 'v2', d_state=3, dt_rank=2)
        getattr(block, part).register_forward_hook(lambda *_, part=part: calls.append(part))
        block(torch.randn(1, 5, 12))
    assert calls == ['norm', 'mixer']


STACKS = [
    {'bidirectional': 'v2'},
    {'bidirectional': 'v2', 'drop_path_rate': 0.5},
    {'bidirectional': 'v1', 'residual_in_fp32': False, 'recompute': True, 'bias': True},
    {'drop_path_rate': 0.2, 'norm_eps': 0.1, 'discretization': 'bilinear', 'reverse': True},
    {'norm': 'LayerNorm', 'drop_path_rate': 0.5},
    {'layer_scale': 0.3, 'drop_path_rate': 0.5},
]


def make_stack(**options):
    torch.manual_seed(0)
    return moved(MambaStack(12, 3, d_state=3, dt_rank=2, **options))


@contextlib.contextmanager
def block_by_block():
    with mock.patch('mmvim.layers.stack.STACK_DEVICES', ()):
        yield


def run_seeded(*args):
    torch.manual_seed(1)
    return run(*args)


@pytest.mark.parametrize('options', STACKS)
def test_a_stack_equals_its_steps(options):
    """With the same random numbers, in one call, in a call for each block, and in none."""
    stack, x = make_stack(**options).double(), torch.randn(6, 5, 12, dtype=torch.float64)
    for _ in range(2):
        found = run_seeded(stack, x)
    with step_by_step(stack):
        torch.testing.assert_close(found, run_seeded(stack, x), rtol=1e-10, atol=1e-12)
    with block_by_block():
        torch.testing.assert_close(found, run_seeded(stack, x), rtol=0, atol=0)


@pytest.mark.parametrize('autocast', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('options', STACKS)
def test_a_stack_under_autocast(options, autocast):
    stack, x = make_stack(**options), torch.randn(6, 5, 12)
    found = run_seeded(stack, x, autocast)
    with block_by_block():
        torch.testing.assert_close(found, run_seeded(stack, x, autocast), rtol=0, atol=0)


@pytest.mark.usefixtures('compiled')
def test_a_stack_is_one_call():
    stack, x = make_stack(bidirectional='v2'), torch.randn(2, 5, 12)

    def calls():
        with mock.patch('mmvim.layers.stack.mixer_stack', side_effect=mixer_stack) as called:
            stack(x)
        return called.call_count

    assert calls() == 1
    stack.eval()
    assert calls() == 1
    stack.layers[1].mixer.discretization = 'bilinear'
    assert calls() == 0
    stack.layers[1].mixer.discretization = 'zoh'
    assert calls() == 1
    with use_backend('torch'):
        assert calls() == 0
    with intercept_ops():
        assert calls() == 0
    assert copy.deepcopy(stack)(x).equal(stack(x))


class Watched(torch.Tensor):
    """Remembers the functions that it is given to."""

    functions: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.functions.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.usefixtures('compiled')
def test_a_stack_notices_changes_of_any_kind():
    """Of attributes that cannot be compared, of the class of a parameter, of the dictionaries."""
    stack, x = make_stack(bidirectional='v2').requires_grad_(False), torch.randn(2, 5, 12)
    first, norm = stack.layers[0], stack.layers[1].norm
    for value in (torch.zeros(3), torch.ones(3), torch.ones(3).numpy(), [torch.ones(2)]):
        first.mixer.note = value
        stack(x)
    norm._parameters = {'weight': nn.Parameter(2 * norm.weight)}
    found = stack(x)
    with block_by_block():
        torch.testing.assert_close(found, stack(x), rtol=0, atol=0)
    weight = first.mixer.out_proj.weight
    watched = nn.Parameter(weight.detach().clone().as_subclass(Watched))
    torch.utils.swap_tensors(weight, watched)
    Watched.functions.clear()
    stack(x)
    assert nn.functional.linear in Watched.functions


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('name', ['layers.1', 'layers.1.norm', 'layers.1.mixer.out_proj'])
def test_a_call_that_is_replaced_is_called(name, monkeypatch):
    stack, x = make_stack(bidirectional='v2'), torch.randn(2, 5, 12)
    stack(x)
    part, called = stack.get_submodule(name), []

    def call(self, *args, **kwargs):
        called.append(self)
        return nn.Module.__call__(self, *args, **kwargs)

    monkeypatch.setattr(type(part), '__call__', call)
    stack(x)
    assert part in called


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize('name', ['layers.1', 'layers.1.norm', 'layers.1.mixer.out_proj'])
def test_a_compiled_part_is_called(name):
    stack, x = make_stack(bidirectional='v2'), torch.randn(2, 5, 12)
    stack(x)
    graphs = []
    stack.get_submodule(name).compile(
        backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    stack(x)
    assert graphs


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_tangents_are_refused(backend):
    """They would be lost, also where no parameter wants a gradient."""
    stack, x = make_stack(bidirectional='v2').requires_grad_(False), torch.randn(2, 5, 12)
    with (
        use_backend(backend),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match='forward'),
    ):
        stack(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.usefixtures('compiled')
def test_a_stack_does_not_keep_blocks_that_were_taken_out():
    stack, x = make_stack(bidirectional='v2'), torch.randn(2, 5, 12)
    stack(x)
    removed = weakref.ref(stack.layers[2])
    del stack.layers[2]
    stack(x)
    gc.collect()
    assert removed() is None


def test_transforms_and_modes_leave_no_probabilities_behind():
    x, keep = torch.randn(2, 5, 12), (0.125, 0.375)
    torch.func.functionalize(lambda t: factors_of(keep, t))(x)
    with FakeTensorMode() as mode:
        factors_of(keep, mode.from_tensor(x))
    assert type(factors_of(keep, x)) is torch.Tensor


def test_a_schedule_of_rates_leaves_few_probabilities_behind():
    for i in range(200):
        factors_of((0.5 + i / 1000,), torch.randn(2, 5, 12))
    assert _on_device.cache_info().currsize < 100


@pytest.mark.usefixtures('compiled')
def test_a_stack_that_has_run_can_be_freed_and_copied():
    stack = make_stack(bidirectional='v2')
    stack(torch.randn(2, 5, 12))
    kept = weakref.ref(stack.layers[0].mixer.A_log)
    assert len(pickle.dumps(stack)) == len(pickle.dumps(copy.deepcopy(stack)))
    del stack
    gc.collect()
    assert kept() is None


@pytest.mark.usefixtures('compiled')
def test_a_stack_keeps_what_its_blocks_keep():
    stack, x = make_stack(bidirectional='v2'), torch.randn(2, 40, 12)
    stack.layers[0].requires_grad_(False)
    in_one = kept_bytes(stack, x.clone())
    with block_by_block():
        assert kept_bytes(stack, x.clone()) == in_one
    with torch.no_grad():
        assert not stack(x).requires_grad


@pytest.mark.usefixtures('compiled')
@pytest.mark.parametrize(
    ('keep', 'count', 'message'),
    [
        (None, 0, 'there must be 19 parameters for each layer, got 0'),
        (None, 20, 'there must be 19 parameters for each layer, got 20'),
        (torch.ones(2, 2), 38, 'keep must have a row for each layer but the first of 2'),
        (torch.ones(2), 38, 'keep must have a row for each layer but the first of 2'),
        (torch.ones(1, 2), 38, 'layer 0 lacks the norm'),
    ],
)
def test_wrong_arguments_of_a_stack(keep, count, message):
    x, residual, _, _, *rest = op_arguments(make(torch.float32, Block), torch.zeros(1, 2, 12))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        torch.ops.mmvim.mixer_stack(x, residual, keep, [None] * count, *rest)


def test_hooked_drop_path_is_called():
    stack, x = make_stack(drop_path_rate=0.5).train(), torch.randn(6, 5, 12)
    stack(x)
    calls = []
    for layer in stack.layers:
        layer.drop_path.register_forward_hook(lambda *_: calls.append(1))
    stack(x)
    assert len(calls) == len(stack.layers)


def test_stochastic_depth_drops_at_its_rates():
    stack = MambaStack(4, 5, d_state=1, drop_path_rate=0.6)
    paths = [layer.drop_path for layer in stack.layers]
    factors = drawn_together(paths, torch.empty(4000, 1, 4))
    for path, row in zip(paths, factors, strict=True):
        kept = torch.tensor(1 / (1 - path.drop_prob))
        assert ((row == 0) | row.isclose(kept)).all()
        assert (row == 0).float().mean() == pytest.approx(path.drop_prob, abs=0.03)
    assert drawn_together(paths[:1], torch.empty(2, 1, 4)) is None
    assert drawn_together([path.eval() for path in paths], torch.empty(2, 1, 4)) is None


@pytest.mark.gpu
@pytest.mark.parametrize('recompute', [True, False])
@pytest.mark.parametrize(
    'size', [(12, 3, 2, 37), (64, 16, 4, 197), (26, 5, 3, 50), (16, 4, 2, 1100)]
)
@pytest.mark.parametrize('options', OPTIONS)
def test_on_cuda(options, size, recompute):
    """At most twice the error of the steps, against float64."""
    d_model, d_state, dt_rank, length = size
    options = {'kind': BiMamba, **options}
    kind = options.pop('kind')
    torch.manual_seed(0)
    mixer = kind(d_model, d_state=d_state, dt_rank=dt_rank, recompute=recompute, **options)
    mixer, x = moved(mixer.double()), torch.randn(2, length, d_model, dtype=torch.float64)

    def flat(results):
        y, dx, grads = results
        return [t.detach().double().cpu().clone() for t in (y, dx, *grads.values())]

    with step_by_step(mixer):
        exact = flat(run(mixer, x))
    mixer, x = mixer.float().cuda(), x.float().cuda()
    for autocast, tolerance in ((None, 2e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)):
        fused = flat(run(mixer, x, autocast))
        with step_by_step(mixer):
            steps = flat(run(mixer, x, autocast))
        for found, other, right in zip(fused, steps, exact, strict=True):
            error, allowed = ((t - right).norm() / right.norm() for t in (found, other))
            assert error <= 2 * allowed + tolerance


@pytest.mark.gpu
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('options', STACKS)
def test_a_stack_on_cuda(options, autocast):
    stack, x = make_stack(**options).cuda(), torch.randn(6, 50, 12, device='cuda')
    # Sums of the scans' gradients are made in any order.
    tolerance = 1e-5 if autocast is None else 2e-2
    found = run_seeded(stack, x, autocast)
    with block_by_block():
        expected = run_seeded(stack, x, autocast)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    stack.eval()
    with torch.inference_mode():
        found = stack(x)
        with block_by_block():
            torch.testing.assert_close(found, stack(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_graph_draws_new_numbers():
    stack = make_stack(bidirectional='v2', drop_path_rate=0.5).cuda().train()
    stack.drop_path.drop_prob = 0.0
    x, graph = torch.randn(64, 5, 12, device='cuda'), torch.cuda.CUDAGraph()
    with torch.no_grad():
        stack(x)
        with torch.cuda.graph(graph):
            y = stack(x)
        found = []
        for _ in range(2):
            graph.replay()
            found.append(y.clone())
    dropped = [(out - stack.eval()(x)).abs().amax((1, 2)) > 1e-3 for out in found]
    assert not dropped[0].equal(dropped[1])


@pytest.mark.gpu
def test_a_graph_sees_new_parameters():
    mixer, x = BiMamba(64).cuda().eval(), torch.randn(2, 197, 64, device='cuda')
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        mixer(x)
        with torch.cuda.graph(graph):
            y = mixer(x)
        for parameter in mixer.parameters():
            parameter.data.add_(0.01 * torch.randn_like(parameter))
        graph.replay()
        torch.testing.assert_close(y, mixer(x), rtol=0, atol=0)


@pytest.mark.parametrize('shape', [(2, 3, 6), (6,), (2, 0, 6)])
@pytest.mark.parametrize('recompute', [True, False])
def test_mlp(shape, recompute):
    torch.manual_seed(0)
    mlp, x = Mlp(6, 20, recompute).double(), torch.randn(shape, dtype=torch.float64)
    y, dx, grads = run(mlp, x)
    with step_by_step(mlp):
        expected_y, expected_dx, expected = run(mlp, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected_dx)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name])
    # Its input and the input of the GELU.
    assert kept_bytes(mlp, x.clone()) == 8 * x.numel() // 6 * (6 + (0 if recompute else 20))


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape', [(2, 24, 64), (3, 64), (0, 5, 64)])
@torch.no_grad()
def test_gelu_in_the_product_on_cuda(shape, dtype, monkeypatch):
    """The steps that it replaces are not nearer to float64."""
    torch.manual_seed(0)
    block = VSSBlock(64, SS2D(64, d_state=1), 4.0, 0.0).cuda()
    monkeypatch.setattr('mmvim.layers.residual.DEVICES', ('cuda',))
    nn.init.normal_(block.mlp.fc1.weight, std=0.2)
    x = torch.randn(shape, device='cuda')

    def out(wanted):
        monkeypatch.setattr('mmvim.layers.mlp.GELU_IN_PRODUCT', wanted)
        with torch.autocast('cuda', dtype):
            return block._add_branch(x, 'norm2', 'mlp').double() - x.double()

    exact = copy.deepcopy(block).double()
    exact = exact.mlp(exact.norm2(x.double()))
    assert out(True).shape == shape
    error, steps = ((out(wanted) - exact).norm() for wanted in (True, False))
    assert error <= 1.05 * steps
    if x.numel() > 0:
        assert not torch.equal(out(True), out(False))


@pytest.mark.parametrize('dims', [2, 3])
def test_patches_by_matrix_product(dims):
    size = (2, 4, 3)[-dims:]
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(3, 8, size, size).double()
    x = torch.randn(2, 3, *(5, 11, 13)[-dims:], dtype=torch.float64, requires_grad=True)
    found, expected = _matrix_product(x, convolution), convolution(x).movedim(1, -1)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(
            torch.autograd.grad(y.square().sum(), (x, convolution.weight))
            for y in (found, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
