"""Joined parameter groups: the settings of every parameter, and checkpoints with and without."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
)
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmvim import compat
from mmvim.engine import ParameterGroupsHook
from mmvim.models import Vim

PARAMWISE = {
    'flat_decay_mult': 0.0,
    'custom_keys': {'A_log': {'decay_mult': 0.0}, 'head': {'lr_mult': 10.0}},
}
SCHEDULERS = [
    {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 3},
    {'type': 'CosineAnnealingLR', 'by_epoch': False, 'begin': 3, 'end': 12, 'eta_min_ratio': 0.1},
    {'type': 'LinearMomentum', 'start_factor': 0.9, 'by_epoch': False, 'end': 6},
]


class Net(nn.Module):
    """A backbone that every constructor takes, with norms, convolutions and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Vim(
            arch={'embed_dims': 8, 'depth': 3, 'd_state': 4}, img_size=16, patch_size=8
        )
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        return self.backbone.get_layer_depth(name, 'backbone.')


class ConvNeXt(nn.Module):
    """The options of mmdet's and mmsegmentation's constructors."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(4))
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(4)) for _ in range(n))
            for n in (3, 3, 9, 3)
        )


class Halved(DefaultOptimWrapperConstructor):
    """A user's: biases learn half as fast."""

    def add_params(self, params, module, **kwargs):
        super().add_params(params, module, **kwargs)
        for group in params:
            if group['params'][0].dim() == 1 and 'halved' not in group:
                group['lr'] = group.get('lr', self.base_lr) / 2
                group['halved'] = True


def default(**paramwise):
    return {'paramwise_cfg': paramwise}


CONSTRUCTORS = {
    'ours': default(**PARAMWISE),
    'norm, bias, dwconv': default(
        norm_decay_mult=0.0, bias_decay_mult=0.5, bias_lr_mult=2.0, dwconv_decay_mult=0.1
    ),
    'custom key with a key of its own': default(
        custom_keys={'norm': {'decay_mult': 0.0, 'fix_lr': True}}, bypass_duplicate=True
    ),
    'no options': {},
    'mmvim layer decay': {
        'constructor': 'mmvim.LayerDecayOptimizerConstructor',
        'paramwise_cfg': {'layer_decay_rate': 0.5, 'flat_decay_mult': 0.0},
    },
    'mmpretrain layer decay': {
        'scope': 'mmpretrain',
        'constructor': 'LearningRateDecayOptimWrapperConstructor',
        'paramwise_cfg': {'layer_decay_rate': 0.5, 'flat_decay_mult': 0.0},
    },
    'mmdet layer decay': {
        'scope': 'mmdet',
        'constructor': 'LearningRateDecayOptimizerConstructor',
        'paramwise_cfg': {'decay_rate': 0.7, 'decay_type': 'layer_wise', 'num_layers': 6},
    },
    'mmseg layer decay': {
        'scope': 'mmseg',
        'constructor': 'LearningRateDecayOptimizerConstructor',
        'paramwise_cfg': {'decay_rate': 0.7, 'decay_type': 'stage_wise', 'num_layers': 6},
    },
    "a user's subclass": {'constructor': 'Halved', **default(**PARAMWISE)},
}
OPTIMIZERS = {
    'AdamW': {'lr': 1e-2, 'weight_decay': 0.1, 'betas': (0.8, 0.9)},
    'SGD': {'lr': 1e-2, 'weight_decay': 0.1, 'momentum': 0.9, 'nesterov': True},
    'mmvim.Lamb': {'lr': 1e-2, 'weight_decay': 0.1},
}


@pytest.fixture(autouse=True, scope='module')
def _halved():
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=Halved)
    yield
    OPTIM_WRAPPER_CONSTRUCTORS.module_dict.pop('Halved')


def fake_runner(wrapper, model=None, schedulers=None):
    logger = MMLogger.get_instance('parameter_groups')
    return SimpleNamespace(
        optim_wrapper=wrapper, model=model, param_schedulers=schedulers, logger=logger
    )


def settings(model, optimizer):
    """Everything that a group says of a parameter, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    of = {}
    for group in optimizer.param_groups:
        for p in group['params']:
            own = {k: v for k, v in group.items() if not k.startswith('param')}
            assert names[id(p)] not in of
            of[names[id(p)]] = own
    return of


@pytest.mark.parametrize('kind', OPTIMIZERS)
@pytest.mark.parametrize('case', CONSTRUCTORS)
def test_settings_of_every_parameter(case, kind):
    config = copy.deepcopy(CONSTRUCTORS[case])
    scope = config.pop('scope', 'mmengine')
    model = Net()
    if scope in ('mmdet', 'mmseg'):
        compat.install()
        pytest.importorskip(f'{scope}.engine')
        model.backbone = ConvNeXt()
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(
            model, {'optimizer': {'type': kind, **OPTIMIZERS[kind]}, **config}
        )
    expected = settings(model, wrapper.optimizer)
    assert ('frozen' in expected) == ('paramwise_cfg' not in config)
    ParameterGroupsHook().before_train(fake_runner(wrapper, model))
    assert settings(model, wrapper.optimizer) == expected
    kinds = {repr(sorted(own.items())) for own in expected.values()}
    assert len(wrapper.optimizer.param_groups) == len(kinds) < len(expected)
    assert wrapper.get_lr()['lr'][0] == next(iter(expected.values()))['lr']
    names = {id(p): name for name, p in model.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        assert 'param_name' not in group
        if 'param_names' in group:
            assert group['param_names'] == [names[id(p)] for p in group['params']]


def test_groups_that_stay_apart(caplog):
    model = Net()
    wrapper = build_optim_wrapper(
        model,
        {'optimizer': {'type': 'SGD', 'lr': 0.1, 'weight_decay': 0.1}, 'paramwise_cfg': PARAMWISE},
    )
    count = len(wrapper.optimizer.param_groups)

    class PerGroup:
        def __init__(self):
            self.own = [0.0] * len(wrapper.param_groups)

    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    class FullyShardedModel(nn.Module):
        pass

    for runner, reason in (
        (fake_runner(wrapper, model, [PerGroup()]), 'PerGroup.own may belong'),
        (fake_runner(wrapper, FullyShardedModel()), 'sharded'),
        (
            fake_runner(OptimWrapper(ZeroRedundancyOptimizer(wrapper.optimizer.param_groups))),
            'groups of its own',
        ),
    ):
        lines = []
        runner.logger = SimpleNamespace(info=lines.append)
        ParameterGroupsHook().before_train(runner)
        assert f'{count} parameter groups, which stay apart' in lines[0]
        assert reason in lines[0]
        assert len(runner.optim_wrapper.optimizer.param_groups) == count


class Points(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {'inputs': torch.randn(3, 16, 16, generator=generator), 'labels': index % 3}


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = Net()
        self.second = nn.Linear(3, 3)

    def forward(self, inputs, labels, mode='tensor'):
        logits = self.second(self.net.head(self.net.backbone(torch.stack(inputs))[-1]))
        return {'loss': nn.functional.cross_entropy(logits, torch.tensor(labels))}


class Two(DefaultOptimWrapperConstructor):
    """Two optimizers, as for GANs."""

    def __call__(self, model):
        parts = {'first': model.net, 'second': model.second}
        return OptimWrapperDict(
            **{
                name: build_optim_wrapper(
                    part,
                    {
                        'optimizer': dict(self.optimizer_cfg),
                        'paramwise_cfg': copy.deepcopy(self.paramwise_cfg),
                    },
                )
                for name, part in parts.items()
            }
        )


class Together(Classifier):
    def train_step(self, data, optim_wrapper):
        losses = self(**self.data_preprocessor(data), mode='loss')
        losses['loss'].backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
            wrapper.zero_grad()
        return losses


def train(folder, iterations, hook, optimizer='AdamW', resume=None, constructor=None, **options):
    torch.manual_seed(0)
    wrapper = {
        'optimizer': {'type': optimizer, **OPTIMIZERS[optimizer]},
        'paramwise_cfg': copy.deepcopy(PARAMWISE),
    }
    if constructor:
        wrapper['constructor'] = constructor
    else:
        wrapper['clip_grad'] = {'max_norm': 0.1}
    schedulers = copy.deepcopy(SCHEDULERS)
    if optimizer == 'mmvim.Lamb':
        schedulers.pop()
    config = dict(
        model=Together() if constructor else Classifier(),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=3, sampler=dict(type='DefaultSampler', shuffle=False), dataset=Points()
        ),
        train_cfg=dict(by_epoch=True, max_epochs=iterations // 4),
        optim_wrapper=wrapper,
        param_scheduler={'first': schedulers, 'second': schedulers} if constructor else schedulers,
        custom_hooks=[dict(type='mmvim.ParameterGroupsHook')] if hook else [],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        randomness=dict(seed=0),
        experiment_name=f'{folder.name}-{iterations}-{hook}-{resume}',
        visualizer=dict(type='Visualizer', vis_backends=[], name=f'{folder}{iterations}{hook}'),
        log_level='ERROR',
        resume=resume is not None,
        load_from=resume and str(resume),
        **options,
    )
    if 'runner_type' in config:
        from mmengine.runner import FlexibleRunner

        config.pop('runner_type')
        config['env_cfg'] = dict(dist_cfg=dict(backend='gloo'))
        runner = FlexibleRunner(**config)
    else:
        runner = Runner(**config)
    runner.train()
    path = folder / f'epoch_{iterations // 4}.pth'
    return runner, torch.load(path, weights_only=False)


def assert_same(a, b, path=''):
    """Equal in every bit, type and key."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f'{path}[{i}]')
    else:
        assert a == b, (path, a, b)


VARIANTS = {
    'AdamW': {},
    'SGD': {'optimizer': 'SGD'},
    'Lamb': {'optimizer': 'mmvim.Lamb'},
    'two optimizers': {'constructor': 'Two'},
    'FlexibleRunner': {'runner_type': 'FlexibleRunner'},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_checkpoints_are_the_same_and_continue_alike(variant, tmp_path):
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=Two, force=True)
    options = VARIANTS[variant]
    folders = {name: tmp_path / name for name in ('plain', 'joined')}
    whole = {}
    for name, folder in folders.items():
        runner, whole[name] = train(folder, 12, name == 'joined', **options)
        wrapper = runner.optim_wrapper
        parts = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        count = sum(len(part.optimizer.param_groups) for part in parts)
        assert count > 30 if name == 'plain' else count < 8
    keys = ('state_dict', 'optimizer', 'param_schedulers')
    for key in keys:
        assert_same(whole['plain'][key], whole['joined'][key], key)
    for source, folder in folders.items():
        for target in ('plain', 'joined'):
            out = tmp_path / f'{source}-{target}'
            resumed = train(out, 12, target == 'joined', resume=folder / 'epoch_2.pth', **options)[
                1
            ]
            for key in keys:
                assert_same(whole['plain'][key], resumed[key], f'{source} to {target}: {key}')


def test_another_implementation_after_a_resume(tmp_path):
    """Fused or not is this run's choice; the state of the checkpoint goes on."""
    train(tmp_path / 'a', 8, True)
    for fused in (None, True):
        options = {**OPTIMIZERS['AdamW'], 'fused': fused}
        before, OPTIMIZERS['AdamW'] = OPTIMIZERS['AdamW'], options
        try:
            folder = tmp_path / f'{fused}'
            runner, state = train(folder, 12, True, resume=tmp_path / 'a' / 'epoch_2.pth')
        finally:
            OPTIMIZERS['AdamW'] = before
        for group in runner.optim_wrapper.optimizer.param_groups:
            assert group['fused'] is fused
        assert all(entry['step'] == 12 for entry in state['optimizer']['state'].values())
