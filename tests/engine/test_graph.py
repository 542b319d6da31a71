"""GraphHook: what it records, and when not; on a GPU, that replays train as eager steps do."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmvim._cuda_graphs import without_garbage_collection
from mmvim.engine import GraphHook
from mmvim.engine.hooks import graph
from mmvim.errors import UserError
from mmvim.models import MambaVision, Vim, VMamba


class Log:
    """Keeps what is logged."""

    def __init__(self):
        self.infos, self.warnings = [], []
        self.info, self.warning = self.infos.append, self.warnings.append


class Net(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, *args, **kwargs):
        return self.backbone(*args, **kwargs)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x, scale=1.0):
        return (self.norm(self.linear(x)) * scale,)


class Recording:
    """Stands for graphs: what the policy does can be seen without a GPU."""

    def __init__(self, leaves):
        self.leaves = leaves
        self.replays = 0

    def replay(self, owner, inputs):
        self.replays += 1
        token = graph._Token()
        owner._waiting = graph.weakref.ref(token)
        output = owner.eager(*inputs)[0]
        output.register_hook(lambda _: setattr(owner, '_waiting', graph._nothing))
        return (Kept.apply(output, token),)


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


class Policy(graph.GraphedForward):
    device_type = 'cpu'

    def _record(self, leaves, structure):
        if self.error:
            raise RuntimeError(self.error)
        return Recording(leaves)

    error = ''


def policy(max_shapes=2):
    module = Part().train()
    module.forward = Policy(module, 'backbone', max_shapes, Log())
    return module, module.forward


def step(module, *args, **kwargs):
    module(*args, **kwargs)[0].sum().backward()


def counts(forward):
    return [recording.replays for recording in forward._recordings.values()]


def test_a_recording_for_each_shape_and_the_oldest_makes_room():
    module, forward = policy()
    a, b, c = (torch.randn(n, 3) for n in (2, 4, 6))
    for x in (a, a, b, a):
        step(module, x)
    assert counts(forward) == [1, 3]
    step(module, c)
    assert counts(forward) == [3, 1]
    step(module, b)
    assert counts(forward) == [1, 1]
    assert [line for line in forward.logger.infos if '2x3' in line]
    assert 'of at most 2 recordings' in forward.logger.infos[0]
    assert not forward.logger.warnings


def test_too_many_shapes():
    module, forward = policy(max_shapes=1)
    for n in range(2, 12):
        step(module, torch.randn(n, 3))
    assert forward._recordings == {}
    (warning,) = forward.logger.warnings
    assert 'more shapes than max_shapes=1' in warning


@pytest.mark.parametrize(
    'change',
    [
        'dtype',
        'stride',
        'argument',
        'requires_grad',
        'frozen',
        'moved',
        'evaluation',
        'part',
        'amp',
    ],
)
def test_what_needs_another_recording(change, monkeypatch):
    module, forward = policy(max_shapes=4)
    x, args = torch.randn(4, 3), ()
    step(module, x)
    if change == 'dtype':
        module.double()
        x = x.double()
    elif change == 'stride':
        x = torch.randn(3, 4).t()
    elif change == 'argument':
        forward._record = lambda leaves, structure: SimpleNamespace(
            replay=lambda owner, inputs: owner.eager(*inputs, 2.0), replays=0
        )
        args = (2.0,)
    elif change == 'requires_grad':
        x.requires_grad_()
    elif change == 'frozen':
        module.linear.weight.requires_grad_(False)
    elif change == 'moved':
        module.linear.weight.data = module.linear.weight.data.clone()
    elif change == 'evaluation':
        module.norm.eval()
    elif change == 'part':
        module.linear = nn.Linear(3, 4)
    elif change == 'amp':
        monkeypatch.setattr(graph, '_settings', lambda: (True, torch.bfloat16))
    step(module, x, *args)
    assert len(forward._recordings) == 2


def test_no_recording_where_nothing_is_trained():
    module, forward = policy()
    x = torch.randn(4, 3)
    with torch.no_grad():
        module(x)
    module.eval()
    module(x)
    assert not forward._recordings
    assert not forward.logger.warnings


@pytest.mark.parametrize('kind', ['forward', 'pre', 'backward', 'parameter'])
def test_hooks_run(kind):
    module, forward = policy()
    x, calls = torch.randn(4, 3), []
    step(module, x)
    register = {
        'forward': module.linear.register_forward_hook,
        'pre': module.linear.register_forward_pre_hook,
        'backward': module.linear.register_full_backward_hook,
        'parameter': module.linear.weight.register_hook,
    }[kind]
    handle = register(lambda *_: calls.append(1))
    for _ in range(2):
        step(module, x)
    assert len(calls) == 2
    assert counts(forward) == [1]
    (warning,) = forward.logger.warnings
    assert 'backbone.linear has hooks' in warning
    handle.remove()
    step(module, x)
    assert counts(forward) == [2]
    # Those of the backbone itself are called around its forward pass.
    module.register_forward_hook(lambda *_: calls.append(1))
    step(module, x)
    assert counts(forward) == [3]
    assert len(calls) == 3


def test_two_calls_before_the_backward_pass():
    module, forward = policy()
    x = torch.randn(4, 3)
    first, second = module(x)[0], module(x)[0]
    assert counts(forward) == [1]
    (first + second).sum().backward()
    assert 'before the backward pass' in forward.logger.warnings[0]
    step(module, x)
    assert counts(forward) == [2]
    module(x)  # whose output nobody keeps
    gc.collect()
    step(module, x)
    assert counts(forward) == [4]


def test_a_failure_is_told_once():
    module, forward = policy()
    forward.error = 'called a synchronizing CUDA operation\nand more'
    for _ in range(3):
        step(module, torch.randn(4, 3))
    (warning,) = forward.logger.warnings
    assert warning.endswith('recording failed: called a synchronizing CUDA operation')


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_on_their_own(copied):
    module = Part()
    module.forward = graph.GraphedForward(module, 'backbone', 3, None)
    twin = copied(Net(module)).backbone
    assert twin.forward.module is twin
    assert twin.forward.max_shapes == 3
    x = torch.randn(4, 3)
    assert torch.equal(twin.eval()(x)[0], module.eval()(x)[0])
    with torch.no_grad():
        twin.linear.weight.zero_()
    assert not torch.equal(twin(x)[0], module(x)[0])


def test_obstacles():
    hook, log = GraphHook(), Log()
    model = Net(Part())
    runner = SimpleNamespace(model=model, logger=log)
    hook.before_train(runner)
    assert 'forward' not in vars(model.backbone)
    assert 'backbone runs without CUDA graphs: it is on cpu, not on one GPU' in log.warnings[0]

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for change, reason in (
        (lambda b: b.compile(backend='eager'), 'it is compiled'),
        (lambda b: setattr(b, 'forward', b.forward), 'replaced'),
        (lambda b: setattr(b, 'norm', nn.SyncBatchNorm(4)), 'SyncBN'),
    ):
        model = Net(Part())
        change(model.backbone)
        hook.before_train(SimpleNamespace(model=model, logger=log))
        assert reason in log.warnings[-1]
    with pytest.raises(UserError, match='graph: Linear has no backbone'):
        hook.before_train(SimpleNamespace(model=nn.Linear(1, 1), logger=log))


@pytest.mark.parametrize('max_shapes', [0, True, 1.5, 'all'])
def test_wrong_arguments(max_shapes):
    with pytest.raises(ValueError, match='max_shapes must be at least 1'):
        GraphHook(max_shapes=max_shapes)


ARCH = {'embed_dims': 32, 'depth': 3, 'd_state': 8}
VISION = {
    'depths': (1, 1, 2, 1), 'embed_dims': 16, 'stem_dims': 16, 'num_heads': (2, 4),
    'window_sizes': (2, 1), 'd_state': 4,
}  # fmt: skip
SCANS_2D = {'depths': (1, 1, 2, 1), 'embed_dims': 16}
BACKBONES = {
    'vim': lambda **kw: Vim(arch=ARCH, img_size=32, patch_size=8, out_indices=(0, 2), **kw),
    'mambavision': lambda **kw: MambaVision(arch=VISION | kw),
    'vmamba': lambda **kw: VMamba(arch=SCANS_2D | kw),
}


def trained(build, graphed, steps=6, amp=None, accumulate=1, sizes=(32,), log=None, **options):
    """Losses, and changes of weights and buffers, after some steps."""
    torch.manual_seed(0)
    backbone = build(**options).cuda().train()
    if graphed:
        backbone.forward = graph.GraphedForward(backbone, 'backbone', 4, log or Log())
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.02, momentum=0.9)
    start = {k: v.double() for k, v in backbone.state_dict().items()}
    losses = []
    for i in range(steps):
        x = torch.randn(4, 3, sizes[i % len(sizes)], sizes[i % len(sizes)]).cuda()
        with torch.autocast('cuda', amp or torch.bfloat16, enabled=amp is not None):
            outputs = backbone(x)
        loss = sum(o.float().square().mean() * (k + 1) for k, o in enumerate(outputs))
        loss.backward()
        losses.append(loss.item())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    state = {k: v.double() - start[k] for k, v in backbone.state_dict().items()}
    return losses, state, torch.cuda.get_rng_state(), backbone


@pytest.mark.gpu
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('amp', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', BACKBONES)
def test_trains_as_without(kind, amp, accumulate):
    log = Log()
    options = dict(amp=amp, accumulate=accumulate, drop_path_rate=0.3)
    expected = trained(BACKBONES[kind], False, **options)
    found = trained(BACKBONES[kind], True, log=log, **options)
    assert not log.warnings
    assert len(log.infos) == 1
    precision = 1e-3 if amp is None else 3e-2
    torch.testing.assert_close(found[0], expected[0], rtol=precision, atol=1e-5)
    # As many random numbers were drawn, so that whatever follows is the same too.
    assert torch.equal(found[2], expected[2])
    whole, error = (
        torch.cat([change.flatten() for change in changes]).norm()
        for changes in (
            expected[1].values(),
            [found[1][key] - value for key, value in expected[1].items()],
        )
    )
    assert error <= precision * whole


@pytest.mark.gpu
def test_leaves_of_another_stream():
    """DDP keeps what accumulates gradients, made on the default stream."""
    backbone, log = BACKBONES['vim']().cuda().train(), Log()
    kept = [p.expand_as(p).grad_fn.next_functions[0][0] for p in backbone.parameters()]
    backbone.forward = graph.GraphedForward(backbone, 'backbone', 4, log)
    for _ in range(3):
        sum(o.sum() for o in backbone(torch.randn(2, 3, 32, 32).cuda())).backward()
    assert len(kept) == len(list(backbone.parameters()))
    assert not log.warnings
    assert all(p.is_leaf for p in backbone.parameters())


@pytest.mark.gpu
def test_a_failed_capture_leaves_nothing_behind():
    class Fails(Part):
        def forward(self, x, scale=1.0):
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return (nn.functional.dropout(super().forward(x)[0], 0.5),)

    module, log = Fails().cuda().train(), Log()
    module.forward = graph.GraphedForward(module, 'backbone', 4, log)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        step(module, torch.randn(4, 3).cuda())
    assert 'recording failed' in log.warnings[0]
    assert torch.cuda.current_stream() == stream
    twin = Part().cuda().train()
    twin.forward = graph.GraphedForward(twin, 'backbone', 4, log)
    step(twin, torch.randn(4, 3).cuda())
    assert len(log.warnings) == 1
    assert len(log.infos) == 1


@pytest.mark.gpu
def test_frozen_parts_and_several_shapes():
    options = dict(sizes=(32, 48, 32), frozen_stages=1)
    log = Log()
    expected = trained(BACKBONES['vim'], False, **options)
    found = trained(BACKBONES['vim'], True, log=log, **options)
    assert not log.warnings
    assert len(log.infos) == 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_random_numbers_are_new_each_time():
    *_, backbone = trained(BACKBONES['vim'], True, steps=2, drop_path_rate=0.9)
    x, seen = torch.randn(4, 3, 32, 32).cuda(), []
    for _ in range(3):
        output = backbone(x)[-1]
        seen.append(output.detach())
        output.sum().backward()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.gpu
@pytest.mark.parametrize('drop', [0.0, 0.5])
def test_recomputed_blocks(drop):
    """Gradients with activation checkpointing are those of the numbers drawn going forward."""
    log = Log()
    options = dict(drop_path_rate=drop, with_cp=True)
    found = trained(BACKBONES['vim'], True, log=log, **options)
    assert not log.warnings
    assert len(log.infos) == 1
    if not drop:
        expected = trained(BACKBONES['vim'], False, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    backbone = found[3].double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64).cuda()
    weight = backbone.layers[1].mixer.out_proj.weight
    direction = torch.randn_like(weight)
    state = torch.cuda.get_rng_state()

    def loss():
        torch.cuda.set_rng_state(state)
        return backbone(x)[-1].square().mean()

    backbone.zero_grad()
    loss().backward()
    gradient = (weight.grad * direction).sum().item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-5)
        values.append(loss().item())
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * 1e-5)
    assert len(backbone.forward._recordings) == 2
    assert not log.warnings
    difference = (values[0] - values[1]) / 2e-5
    assert abs(difference - gradient) <= 1e-5 * abs(gradient) + 1e-9
    assert gradient != 0


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_not_recorded():
    class Waits(Part):
        def forward(self, x, scale=1.0):
            return super().forward(x, float(x.sum()))

    module, log = Waits().cuda().train(), Log()
    module.forward = graph.GraphedForward(module, 'backbone', 4, log)
    x = torch.randn(4, 3).cuda()
    for _ in range(2):
        step(module, x)
    (warning,) = log.warnings
    assert 'recording failed' in warning
    assert 'synchroniz' in warning
    assert torch.rand(2, device='cuda').shape == (2,)
    assert int(module.norm.num_batches_tracked) == 2


@pytest.mark.gpu
def test_unused_parameters_and_a_second_backward_pass():
    module, log = Part().cuda().train(), Log()
    module.forward = graph.GraphedForward(module, 'backbone', 4, log)
    x = torch.randn(4, 3).cuda()
    output = module(x)[0].sum()
    output.backward(retain_graph=True)
    assert module.unused.grad is None
    assert not log.warnings
    with pytest.raises(RuntimeError, match='second backward pass'):
        output.backward()


def test_nothing_is_collected_while_a_graph_is_recorded():
    class Cycle:
        def __init__(self):
            self.itself = self

    cycle = Cycle()
    before = weakref.ref(cycle)
    del cycle
    with without_garbage_collection():
        assert before() is None
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
