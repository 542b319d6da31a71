"""``NonFiniteHook``: what it finds, and that nothing of a bad step stays."""

import copy
import math
import re

import pytest
import torch
from torch import nn

pytest.importorskip('mmengine')

from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmvim.engine import NonFiniteHook
from mmvim.errors import UserError

BAD = 5  # The iteration, counted from 0, at which something goes wrong.


class Overflow(torch.autograd.Function):
    """Finite forward, infinite backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.fault = None

    def forward(self, x):
        x = torch.tanh(self.norm(self.linear(x)))
        if self.fault == 'output':
            x = x / torch.zeros(())
        return Overflow.apply(x) if self.fault == 'gradient' else x


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4, 1)
        self.loss_fault = False

    def forward(self, inputs, mode='tensor'):
        x = inputs
        for layer in self.layers:
            x = self.dropout(layer(x))
        loss = self.head(x).square().mean()
        return {'loss': loss + math.nan if self.loss_fault else loss, 'loss_two': loss * 0}


def make_fault_hook(kind: str, at: tuple[int, ...]):
    from mmengine.hooks import Hook

    class FaultHook(Hook):
        # Before the hook that is tested takes what the iteration starts from.
        priority = 'HIGHEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            model = getattr(runner.model, 'module', runner.model)
            bad = runner.iter in at
            layer = model.layers[1]
            layer.fault = kind if bad and kind in ('output', 'gradient') else None
            model.loss_fault = bad and kind == 'loss'
            if bad and kind == 'input':
                data_batch['inputs'][0, 0] = math.nan
            if bad and kind == 'parameter':
                layer.linear.weight.data[0, 0] = math.inf

    return FaultHook()


def run(tmp_path, *hooks, iters=12, name='run', accumulate=1):
    torch.manual_seed(0)
    data = [{'inputs': torch.randn(4)} for _ in range(48)]
    runner = Runner(
        Model(),
        str(tmp_path / name),
        train_dataloader={
            'dataset': data,
            'batch_size': 4,
            'num_workers': 0,
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
            'collate_fn': {'type': 'default_collate'},
        },
        train_cfg={'by_epoch': False, 'max_iters': iters},
        optim_wrapper={
            'type': 'OptimWrapper',
            'optimizer': {'type': 'AdamW', 'lr': 0.01},
            'accumulative_counts': accumulate,
        },
        default_hooks={'checkpoint': None, 'logger': None},
        custom_hooks=list(hooks),
        randomness={'seed': 0},
        experiment_name=f'{tmp_path}/{name}',
        default_scope='mmengine',
        log_level='ERROR',
    )
    runner.train()
    return runner


WHERE = {
    'output': r'the loss is (nan|-?inf) at epoch 1, iteration 6: the first output that is not '
    r'finite is that of layers\.1 \(Layer\) \(16 of 16 values; its input is finite, up to',
    'gradient': r'a gradient is not finite at epoch 1, iteration 6: going backwards, the first '
    r'gradient that is not finite is that of its input in layers\.1 \(Layer\)|'
    r'of its parameter \w+ in layers\.1\.norm',
    'loss': r'the loss is nan at epoch 1, iteration 6: every layer is finite, but the loss is not '
    r'\(.*loss: nan',
    'input': r'the loss is nan at epoch 1, iteration 6: the input is not finite \(1 of 16 values\)',
    'parameter': r'the loss is (nan|-?inf) at .*: the parameter layers\.1\.linear\.weight is not '
    'finite itself',
}


@pytest.mark.parametrize('kind', WHERE)
def test_stops_and_says_where(tmp_path, kind, count):
    with pytest.raises(UserError) as caught:
        run(tmp_path, make_fault_hook(kind, (BAD,)), NonFiniteHook())
    assert re.search(WHERE[kind], str(caught.value)), str(caught.value)
    count('faults')


@pytest.mark.parametrize('kind', ['output', 'gradient', 'loss', 'input'])
def test_skips_and_leaves_no_trace(tmp_path, kind, count):
    """Nothing of the skipped step is left in weights, optimizer and buffers."""
    from mmengine.hooks import Hook

    kept = {}

    class Keep(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            kept[runner.iter] = copy.deepcopy(
                [runner.model.state_dict(), runner.optim_wrapper.state_dict()]
            )

    hook = NonFiniteHook('skip')
    runner = run(tmp_path, make_fault_hook(kind, (BAD, BAD + 1)), hook, Keep())
    assert hook.skipped == 2
    assert runner.message_hub.get_info('non_finite_steps') == 2
    flat = [_flat(kept[i]) for i in (BAD - 1, BAD, BAD + 1, BAD + 2)]
    for after in flat[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(flat[0], after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(flat[0], flat[3], strict=True))
    assert all(torch.isfinite(value).all() for value in _flat(kept[11]))
    count('faults', 2)


def _flat(node) -> list:
    if isinstance(node, torch.Tensor):
        return [node]
    if isinstance(node, dict):
        node = list(node.values())
    return [x for item in node for x in _flat(item)] if isinstance(node, list | tuple) else []


def test_changes_nothing_when_all_is_finite(tmp_path):
    plain = run(tmp_path, name='plain')
    hook = NonFiniteHook('skip')
    guarded = run(tmp_path, hook, name='guarded')
    for a, b in zip(
        plain.model.state_dict().values(), guarded.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert hook.skipped == 0


def test_gives_up_after_too_many_in_a_row(tmp_path, count):
    with pytest.raises(UserError, match='3 times in a row'):
        run(
            tmp_path,
            make_fault_hook('output', tuple(range(4, 12))),
            NonFiniteHook('skip', max_consecutive=3),
        )
    count('faults', 3)


def test_accumulated_gradients_are_dropped_with_the_step(tmp_path, count):
    hook = NonFiniteHook('skip')
    runner = run(tmp_path, make_fault_hook('output', (BAD,)), hook, accumulate=4)
    assert hook.skipped == 1
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    count('faults')


def test_bad_steps_with_good_ones_between_do_not_stop(tmp_path, count):
    hook = NonFiniteHook('skip', max_consecutive=3)
    run(tmp_path, make_fault_hook('loss', (2, 3, 5, 6, 8, 9)), hook)
    assert hook.skipped == 6
    count('faults', 6)


@pytest.mark.parametrize(
    'kwargs', [dict(action='ignore'), dict(max_consecutive=0)], ids=['action', 'max_consecutive']
)
def test_wrong_arguments(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        NonFiniteHook(**kwargs)
