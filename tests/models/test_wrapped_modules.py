"""Whatever is put on or around a submodule acts, in every backbone."""

import contextlib
import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize, prune

from mmvim.models import MambaVision, VideoMamba, Vim

ARCH = dict(embed_dims=16, depth=2, d_state=4)
HYBRID = dict(depths=(1, 1, 2, 2), embed_dims=8, stem_dims=8, num_heads=(2, 2))
IMAGE, VIDEO = (1, 3, 32, 32), (1, 3, 2, 32, 32)
BACKBONES = {
    'vim-v2': (lambda: Vim(ARCH, img_size=32, out_type='raw'), IMAGE),
    'vim-v1': (lambda: Vim(ARCH, img_size=32, out_type='raw', bimamba='v1'), IMAGE),
    'vim-none': (lambda: Vim(ARCH, img_size=32, out_type='raw', bimamba='none'), IMAGE),
    'vim-pairs': (
        lambda: Vim(ARCH, img_size=32, out_type='raw', bimamba='none', if_bidirectional=True),
        IMAGE,
    ),
    'videomamba': (lambda: VideoMamba(ARCH, img_size=32, num_frames=2, out_type='raw'), VIDEO),
    'videomamba-none': (
        lambda: VideoMamba(ARCH, img_size=32, num_frames=2, out_type='raw', bimamba='none'),
        VIDEO,
    ),
    'mambavision': (lambda: MambaVision(HYBRID, out_type='featmap'), IMAGE),
}
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def build(backbone, device):
    torch.manual_seed(0)
    make, shape = BACKBONES[backbone]
    model = make().double().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), torch.randn(shape, dtype=torch.float64, device=device)


def submodules(model):
    """Names of all modules that are called at all."""
    return [name for name, m in model.named_modules() if name and not isinstance(m, nn.ModuleList)]


def with_weights(model):
    return [name for name in submodules(model) if 'weight' in model.get_submodule(name)._parameters]


def copies(backbone, device, names):
    """A fresh model that has run, its input, the name of a submodule and the submodule."""
    model, x = build(backbone, device)
    for name in names(model):
        fresh = copy.deepcopy(model)
        with torch.no_grad():
            fresh(x)
        yield fresh, x, name, fresh.get_submodule(name)


def total(outputs):
    return sum(out.square().sum() for out in outputs)


def instance_forward(module, seen):
    forward = module.forward

    def replaced(*args, **kwargs):
        seen.append('forward')
        return forward(*args, **kwargs)

    module.forward = replaced


def subclass(module, seen):
    kind = type(module)

    def forward(self, *args, **kwargs):
        seen.append('forward')
        return kind.forward(self, *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {'forward': forward})


def forward_hook(**options):
    return lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1), **options)


def forward_pre_hook(**options):
    return lambda module, seen: module.register_forward_pre_hook(
        lambda *_: seen.append(1), **options
    )


FORWARD = {
    'instance-forward': instance_forward,
    'subclass': subclass,
    'hook': forward_hook(),
    'hook-kwargs': forward_hook(with_kwargs=True),
    'hook-always': forward_hook(always_call=True),
    'pre-hook': forward_pre_hook(),
    'pre-hook-kwargs': forward_pre_hook(with_kwargs=True),
}
BACKWARD = {
    'backward-hook': lambda module, seen: module.register_full_backward_hook(
        lambda *_: seen.append(1)
    ),
    'backward-pre-hook': lambda module, seen: module.register_full_backward_pre_hook(
        lambda *_: seen.append(1)
    ),
}
GLOBAL = {
    'hook': module_hooks.register_module_forward_hook,
    'hook-always': lambda f: module_hooks.register_module_forward_hook(f, always_call=True),
    'pre-hook': module_hooks.register_module_forward_pre_hook,
    'backward-hook': module_hooks.register_module_full_backward_hook,
    'backward-pre-hook': module_hooks.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize('sort', FORWARD)
@pytest.mark.parametrize('gradient', [False, True])
def test_seen_in_forward(backbone, device, sort, gradient):
    for model, x, name, module in copies(backbone, device, submodules):
        seen = []
        FORWARD[sort](module, seen)
        with torch.set_grad_enabled(gradient):
            model(x)
        assert seen, name


@pytest.mark.parametrize('sort', BACKWARD)
def test_seen_in_backward(backbone, device, sort):
    for model, x, name, module in copies(backbone, device, submodules):
        seen = []
        BACKWARD[sort](module, seen)
        total(model(x.requires_grad_())).backward()
        assert seen, name


@pytest.mark.parametrize('sort', GLOBAL)
def test_global_hooks_see_every_module(backbone, device, sort):
    model, x = build(backbone, device)
    model(x)
    seen = set()
    handle = GLOBAL[sort](lambda module, *_: seen.add(module))
    try:
        total(model(x.requires_grad_())).backward()
    finally:
        handle.remove()
    assert [name for name in submodules(model) if model.get_submodule(name) not in seen] == []


def test_a_patched_class_acts(backbone, device, monkeypatch):
    model, x = build(backbone, device)
    model(x)
    for kind in {type(m) for m in model.modules()} - {nn.ModuleList, type(model)}:
        seen = set()

        def forward(self, *args, kind=kind, real=kind.forward, seen=seen, **kwargs):
            seen.add(self)
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(kind, 'forward', forward)
            model(x)
        assert seen >= {m for m in model.modules() if type(m) is kind}, kind


def test_what_a_hook_returns_is_used(backbone, device):
    model, x = build(backbone, device)
    expected = total(model(x)).item()
    for model, x, name, module in copies(backbone, device, submodules):

        def changed(_, inputs, output):
            if isinstance(output, torch.Tensor):
                return output + torch.linspace(0, 1, output.numel()).view_as(output).to(output)
            return tuple(changed(_, inputs, y) if torch.is_tensor(y) else y for y in output)

        module.register_forward_hook(changed)
        assert total(model(x)).item() != pytest.approx(expected, rel=1e-11), name


class Adapter(nn.Module):
    """A submodule and a share of its input or output, as adapters have it."""

    def __init__(self, base, seen):
        super().__init__()
        self.base = base
        self.seen = seen

    def forward(self, *args, **kwargs):
        self.seen.append(1)
        return self.base(*args, **kwargs)


class TransparentAdapter(Adapter):
    """An adapter with the attributes of what it adapts."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)


@pytest.mark.parametrize('kind', [Adapter, TransparentAdapter])
@pytest.mark.parametrize('gradient', [False, True])
def test_adapters_act_or_are_refused_by_name(backbone, device, kind, gradient):
    for model, x, name, module in copies(backbone, device, submodules):
        parent, _, last = name.rpartition('.')
        seen = []
        adapter = kind(module, seen)
        setattr(model.get_submodule(parent), last, adapter)
        refusal = None
        if kind is Adapter and last.startswith('dt_proj'):
            refusal = TypeError, r'Adapter cannot stand for a DeltaProjection.*bias'
        elif kind is Adapter and re.fullmatch(r'layers\.\d|levels\.[012]', name):
            # The backbone asks it for its parts.
            refusal = AttributeError, "'Adapter' object has no attribute"
        with (
            torch.set_grad_enabled(gradient),
            pytest.raises(refusal[0], match=refusal[1]) if refusal else contextlib.nullcontext(),
        ):
            model(x)
        assert seen or refusal, name


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize('gradient', [False, True])
def test_parametrizations_act(backbone, device, gradient):
    for model, x, name, module in copies(backbone, device, with_weights):
        expected = copy.deepcopy(model)
        with torch.no_grad():
            expected.get_submodule(name).weight *= 2
        parametrize.register_parametrization(module, 'weight', Doubled())
        with torch.set_grad_enabled(gradient):
            for given, wanted in zip(model(x), expected(x), strict=True):
                torch.testing.assert_close(given, wanted, msg=name)


def test_replaced_parts_are_read(backbone, device):
    """Parameters, submodules and options that are other ones than in the pass before."""

    def renew(module):
        module._parameters['weight'] = nn.Parameter(module.weight.detach() + 1)

    def change_eps(module):
        module.eps = 0.5

    for model, x, name, module in copies(backbone, device, with_weights):
        for change in (renew, *([change_eps] if hasattr(module, 'eps') else [])):
            before = total(model(x)).item()
            change(module)
            found = total(model(x)).item()
            assert found != pytest.approx(before, rel=1e-11), name
            assert found == pytest.approx(total(copy.deepcopy(model)(x)).item(), rel=1e-13), name


def test_pruned_weights_train(backbone, device):
    for model, x, name, module in copies(backbone, device, with_weights):
        prune.random_unstructured(module, 'weight', amount=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            total(model(x)).backward()
            optimizer.step()
        gradient = module.weight_orig.grad
        assert gradient[module.weight_mask == 0].count_nonzero() == 0, name
        assert gradient.count_nonzero() > 0, name
        model(x)
        torch.testing.assert_close(module.weight, module.weight_orig * module.weight_mask)


def test_weights_may_be_plain_tensors(backbone, device):
    for model, x, name, module in copies(backbone, device, with_weights):
        expected = copy.deepcopy(model)
        total(expected(x)).backward()
        model.requires_grad_(False)
        weight = module.weight.detach().clone().requires_grad_()
        del module.weight
        module.weight = weight
        total(model(x)).backward()
        wanted = expected.get_submodule(name).weight.grad
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-8, atol=1e-9, msg=name)


class DoublingTensor(torch.Tensor):
    """A weight whose product with anything is twice what it would be, as a quantiser's might."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if function is nn.functional.linear:
            return 2 * out.as_subclass(torch.Tensor)
        return out


def test_tensor_subclasses_act_as_weights(backbone, device):
    def linears(model):
        return [n for n in submodules(model) if type(model.get_submodule(n)) is nn.Linear]

    for model, x, name, module in copies(backbone, device, linears):
        expected = copy.deepcopy(model)
        bias = module.bias is not None
        with torch.no_grad():
            hooked = expected.get_submodule(name)
            hooked.weight *= 2
            if bias:
                hooked.bias *= 2
        module.weight = nn.Parameter(module.weight.detach().as_subclass(DoublingTensor))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for net, value in zip((model, expected), inputs, strict=True):
            total(net(value)).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-8, atol=1e-9, msg=name)


def test_functional_call(backbone, device):
    model, x = build(backbone, device)
    expected = total(model(x))
    expected.backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    found = total(torch.func.functional_call(model.requires_grad_(False), weights, (x,)))
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_traces_outside_no_grad_can_be_saved(backbone, device, tmp_path):
    model, x = build(backbone, device)
    traced = torch.jit.trace(model, x)
    torch.jit.save(traced, tmp_path / 'traced.pt')
    loaded = torch.jit.load(tmp_path / 'traced.pt')
    for given, wanted in zip(loaded(x), model(x), strict=True):
        torch.testing.assert_close(given, wanted)
