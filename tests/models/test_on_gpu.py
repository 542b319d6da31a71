"""The backbones on a GPU: compiled kernels against float64, under autocast, without waiting."""

import pytest
import torch

from mmvim.models import MambaVision, VideoMamba, Vim, VMamba

pytestmark = pytest.mark.gpu

SMALL = {'embed_dims': 64, 'depth': 2, 'd_state': 16}
HYBRID = {
    'depths': (1, 1, 2, 2),
    'embed_dims': 32,
    'stem_dims': 16,
    'num_heads': (2, 2, 4, 4),
    'window_sizes': (8, 8, 4, 2),
}
MODELS = {
    'vim': (Vim, SMALL, {'img_size': 64}, (2, 3, 64, 64)),
    'vim-map': (
        Vim,
        SMALL,
        {'img_size': 64, 'cls_token': 'none', 'out_type': 'featmap'},
        (2, 3, 64, 96),
    ),
    'vim-v1': (Vim, SMALL, {'img_size': 64, 'bimamba': 'v1'}, (2, 3, 64, 64)),
    'videomamba': (VideoMamba, SMALL, {'img_size': 64, 'num_frames': 4}, (2, 3, 4, 64, 64)),
    'mambavision': (MambaVision, HYBRID, {}, (2, 3, 96, 64)),
    'vmamba': (VMamba, {'depths': (1, 1, 2, 1), 'embed_dims': 32}, {}, (2, 3, 96, 64)),
}


def build(name, backend, device='cuda', dtype=torch.float32):
    torch.manual_seed(0)
    cls, arch, options, shape = MODELS[name]
    model = cls(arch, drop_path_rate=0.0, ops_backend=backend, **options)
    model.init_weights()
    # The statistics of two images are no business of this comparison.
    return model.to(device, dtype).eval(), torch.randn(shape).to(device, dtype)


def run(model, x, autocast=None):
    with torch.autocast('cuda', autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(x)[-1]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    (out * weight.view_as(out)).sum().backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


def error(value, exact):
    return ((value.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


@pytest.fixture(autouse=True)
def exact_matmuls():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize('name', MODELS)
def test_outputs_and_gradients(name):
    exact, exact_gradients = run(*build(name, 'torch', 'cpu', torch.float64))
    out, gradients = run(*build(name, 'compiled'))
    assert error(out, exact) < 1e-5
    assert gradients.keys() == exact_gradients.keys()
    for key, value in exact_gradients.items():
        assert error(gradients[key], value) < 1e-4, key


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', MODELS)
def test_autocast(name, dtype):
    exact, exact_gradients = run(*build(name, 'torch', 'cpu', torch.float64))
    compiled, torch_path = (run(*build(name, b), autocast=dtype) for b in ('compiled', 'torch'))
    assert error(compiled[0], exact) < 2 * error(torch_path[0], exact) + 1e-3
    for key, value in exact_gradients.items():
        allowed = 2 * error(torch_path[1][key], value) + 1e-2
        assert error(compiled[1][key], value) < allowed, key


@pytest.mark.parametrize('name', MODELS)
def test_nothing_waits_for_the_gpu(name):
    model, x = build(name, 'compiled')
    model.train()
    run(model, x, torch.bfloat16)
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.autocast('cuda', torch.bfloat16):
            model(x)[-1].float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', MODELS)
def test_cuda_graph(name):
    model, x = build(name, 'compiled')
    with torch.no_grad():
        expected = model(x)[-1].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)[-1]
        out.zero_()
        graph.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('name', ['vim', 'mambavision'])
def test_compiles_whole(name):
    model, x = build(name, 'compiled')
    with torch.no_grad():
        expected = model(x)[-1]
        out = torch.compile(model, fullgraph=True)(x)[-1]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['mambavision', 'vmamba'])
def test_convolutions_work_channels_last(name):
    model, x = build(name, 'compiled')
    layouts = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            # A map without its padding is not contiguous.
            module.register_forward_pre_hook(lambda _, args: layouts.append(args[0].stride(1) == 1))
    model(x)
    assert layouts
    assert all(layouts)
