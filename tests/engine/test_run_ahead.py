"""Deferred values are mmengine's values; preprocessors that do not wait give the same batches."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel, ExponentialMovingAverage
from torch import nn

from mmvim import compat, engine
from mmvim.engine import RunAheadHook
from mmvim.engine.hooks import run_ahead

VALUES = [1, 2.5, -3.0, float('inf'), 0.25]


def pair(values=VALUES):
    """mmengine's history and the deferred one, of which every other value is a tensor."""
    plain, deferred = HistoryBuffer(), run_ahead._DeferredHistory()
    for i, value in enumerate(values):
        plain.update(value, i + 1)
        kind = torch.float32 if i % 3 else torch.float64
        tensor = torch.tensor(float(value), dtype=kind).reshape([1] * (i % 2))
        deferred.update(tensor if i % 2 else value, i + 1)
    return plain, deferred


def test_history():
    plain, deferred = pair()
    assert deferred._pending
    assert deferred.current() == plain.current()
    assert deferred._pending, 'the last number needs no fetch'
    for name in ('mean', 'min', 'max'):
        for window in (None, 2):
            assert deferred.statistics(name, window) == plain.statistics(name, window)
    assert not deferred._pending
    for a, b in zip(plain.data, deferred.data, strict=True):
        assert np.array_equal(a, b)
    deferred.update(torch.tensor(7.0))
    assert deferred.current() == 7.0
    assert len(deferred.data[0]) == len(VALUES) + 1


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_of_mmengine(copied):
    plain, deferred = pair()
    twin = copied(deferred)
    assert type(twin) is HistoryBuffer
    for a, b in zip(plain.data, twin.data, strict=True):
        assert np.array_equal(a, b)
    assert b'mmvim' not in pickle.dumps(deferred)
    twin = run_ahead._DeferredHistory(twin)
    twin.update(5.0)
    assert twin.current() == 5.0
    assert len(twin.data[0]) == len(VALUES) + 1


def test_history_keeps_its_limits(monkeypatch):
    monkeypatch.setattr(run_ahead, '_MOST_PENDING', 4)
    deferred = run_ahead._DeferredHistory(HistoryBuffer([9], [1], max_length=6))
    for i in range(3):
        deferred.update(torch.tensor(float(i)))
    assert len(deferred._pending) == 3
    for i in range(3, 9):
        deferred.update(float(i))
        assert len(deferred._pending) < 4
    assert deferred.data[0].tolist() == [3, 4, 5, 6, 7, 8]


class Model(BaseModel):
    def __init__(self):
        super().__init__(data_preprocessor=dict(type='ImgDataPreprocessor'))
        self.linear = nn.Linear(2, 2)

    def forward(self, inputs):
        return self.linear(inputs)


def runner_of(hub, **wrapper):
    return SimpleNamespace(message_hub=hub, model=Model(), optim_wrapper=SimpleNamespace(**wrapper))


def test_hub():
    names = ('test_hub_plain', 'test_hub_deferred')
    plain, deferred = (MessageHub.get_instance(name) for name in names)
    deferred.update_scalar('train/before', 3.0)
    plain.update_scalar('train/before', 3.0)
    calls = []

    def clip(parameters, **kwargs):
        calls.append((parameters, kwargs))
        return torch.tensor(4.0)

    runner = runner_of(deferred, clip_func=clip, grad_name='grad_norm')
    RunAheadHook().before_train(runner)
    assert MessageHub.get_instance(names[1]) is deferred
    assert all(m._non_blocking for m in runner.model.modules() if hasattr(m, '_non_blocking'))
    assert runner.optim_wrapper.clip_func([1], max_norm=2) is None
    assert calls == [([1], {'max_norm': 2})]
    plain.update_scalar('train/grad_norm', torch.tensor(4.0))
    for hub in (plain, deferred):
        hub.update_scalar('train/before', np.float32(0.5), resumed=True)
        hub.update_scalars({'a': 1, 'b': {'value': torch.tensor([2.0]), 'count': 3}}, resumed=False)
    assert deferred.get_scalar('train/before').mean() == 1.75
    for a, b in ((plain, deferred), (plain.state_dict(), deferred.state_dict())):
        scalars = [x['log_scalars'] if isinstance(x, dict) else x.log_scalars for x in (a, b)]
        assert scalars[0].keys() == scalars[1].keys()
        for key, history in scalars[0].items():
            assert history.data[0].tolist() == scalars[1][key].data[0].tolist()
            assert history.data[1].tolist() == scalars[1][key].data[1].tolist()
    with pytest.raises(AssertionError):
        deferred.update_scalar('two', torch.ones(2))
    with pytest.raises(AssertionError, match='resumed keys'):
        deferred.update_scalar('a', 1.0, resumed=True)
    with pytest.raises(TypeError, match='count'):
        deferred.update_scalar('c', 1.0, count=1.5)
    fresh = MessageHub.get_instance('test_hub_fresh')
    fresh.load_state_dict(pickle.loads(pickle.dumps(deferred.state_dict())))
    assert fresh.get_scalar('train/grad_norm').current() == 4.0


@pytest.mark.parametrize('ahead', [0, -1, 1.5, True, '2'])
def test_wrong_arguments(ahead):
    with pytest.raises(ValueError, match='ahead must be at least 1'):
        RunAheadHook(ahead=ahead)


@pytest.mark.gpu
def test_values_of_a_gpu_are_fetched_late():
    hub = MessageHub.get_instance('test_hub_gpu')
    RunAheadHook().before_train(runner_of(hub))
    counter = torch.zeros((), device='cuda')
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            counter += 1
            hub.update_scalar('train/counter', counter)
            hub.update_scalar('train/loss', (counter * 2).bfloat16())
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert hub.get_scalar('train/counter').data[0].tolist() == [1, 2, 3]
    assert hub.get_scalar('train/loss').data[0].tolist() == [2, 4, 6]


@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('interval', [1, 2])
def test_average_is_mmengines(update_buffers, interval):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    options = {'momentum': 0.1, 'interval': interval, 'update_buffers': update_buffers}
    averages = [
        kind(model, **options)
        for kind in (ExponentialMovingAverage, engine.ExponentialMovingAverage)
    ]
    for _ in range(5):
        model[:2](torch.randn(8, 3))
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        for average in averages:
            average.update_parameters(model)
    states = [average.state_dict() for average in averages]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert value.dtype == states[1][key].dtype, key
        assert torch.equal(value, states[1][key]), key


def test_copies_of_an_average_go_on_alone():
    model = nn.Linear(2, 2)
    average = engine.ExponentialMovingAverage(model, momentum=0.5)
    for _ in range(2):
        average.update_parameters(model)
    twin = copy.deepcopy(average)
    with torch.no_grad():
        model.weight += 1
    before = average.module.weight.clone()
    twin.update_parameters(model)
    assert torch.equal(average.module.weight, before)
    torch.testing.assert_close(twin.module.weight, before + 0.5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight.fill_(3)
    average.update_parameters(other)
    torch.testing.assert_close(average.module.weight, (before + 3) / 2)


class Quicker(engine.ExponentialMovingAverage):
    def avg_func(self, averaged_param, source_param, steps):
        averaged_param.fill_(7)


def test_an_average_of_another_rule_keeps_it():
    model = nn.Linear(2, 2)
    average = Quicker(model)
    for _ in range(2):
        average.update_parameters(model)
    assert all((p == 7).all() for p in average.module.parameters())


AUGMENTS = {
    'none': None,
    'mixup': {'augments': [{'type': 'Mixup', 'alpha': 0.8}]},
    'cutmix': {'augments': [{'type': 'CutMix', 'alpha': 1.0}]},
    'minmax': {'augments': [{'type': 'CutMix', 'alpha': 1.0, 'cutmix_minmax': [0.2, 0.6]}]},
    'either or none': {
        'augments': [{'type': 'Mixup', 'alpha': 0.8}, {'type': 'CutMix', 'alpha': 1.0}],
        'probs': [0.4, 0.4],
    },
}


def unpatched(owner, name='forward'):
    return owner.__dict__[name].__wrapped__


@pytest.mark.parametrize('labels', ['one', 'several', 'scores'])
@pytest.mark.parametrize('augments', AUGMENTS)
@pytest.mark.parametrize('onehot', [False, True])
def test_classification_batches(augments, labels, onehot, monkeypatch):
    compat.install()
    mmpretrain = pytest.importorskip('mmpretrain.models')
    from mmpretrain.models.utils.batch_augments import CutMix, Mixup
    from mmpretrain.structures import DataSample

    preprocessor = mmpretrain.ClsDataPreprocessor(
        mean=[120, 110, 100], std=[50, 60, 70], to_rgb=True, to_onehot=onehot, num_classes=5,
        batch_augments=copy.deepcopy(AUGMENTS[augments]),
    )  # fmt: skip

    def batch():
        samples = [DataSample() for _ in range(6)]
        for i, sample in enumerate(samples):
            if labels == 'scores':
                sample.set_gt_score(torch.eye(5)[i % 5])
            else:
                sample.set_gt_label(i % 5 if labels == 'one' else [i % 5, (i + 1) % 5])
        inputs = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
        return {'inputs': inputs, 'data_samples': samples}

    def run(forward):
        np.random.seed(3)
        torch.manual_seed(3)
        return [forward(preprocessor, batch(), training) for training in (True, True, False, True)]

    found = run(type(preprocessor).forward)
    for owner in (Mixup, CutMix):
        monkeypatch.setattr(owner, 'mix', unpatched(owner, 'mix'))
    expected = run(unpatched(type(preprocessor)))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a['inputs'], b['inputs'])
        for x, y in zip(a['data_samples'], b['data_samples'], strict=True):
            assert x.keys() == y.keys()
            assert x.metainfo == y.metainfo
            for key in x.keys():  # noqa: SIM118  # iterating over a sample gives nothing
                assert x.get(key).dtype == y.get(key).dtype
                assert torch.equal(x.get(key), y.get(key))


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('kind', ['detection', 'segmentation', 'stacked'])
def test_channels(kind, channels):
    compat.install()
    options = dict(mean=[1, 2, 3], std=[2, 3, 4], bgr_to_rgb=True)
    if channels != 3:
        options.update(mean=[1], std=[2])
    training = False
    if kind == 'segmentation':
        owner = pytest.importorskip('mmseg.models').SegDataPreProcessor
        patched = owner
    else:
        owner = pytest.importorskip('mmdet.models').DetDataPreprocessor
        patched = owner.__mro__[1]
        training = True
    preprocessor = owner(**options)
    images = [torch.randint(256, (channels, 8, 8), dtype=torch.uint8) for _ in range(2)]
    inputs = torch.stack(images) if kind == 'stacked' else images
    given = copy.deepcopy(inputs)

    def run():
        try:
            return preprocessor({'inputs': inputs}, training)['inputs']
        except (AssertionError, IndexError) as error:
            return type(error)

    found = run()
    forward = patched.forward
    patched.forward = unpatched(patched)
    try:
        expected = run()
    finally:
        patched.forward = forward
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found)
    else:
        assert expected is found
    assert preprocessor._channel_conversion
    assert all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_no_preprocessor_waits(task):
    compat.install()
    inputs = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8).pin_memory()
    if task == 'classification':
        kind = pytest.importorskip('mmpretrain.models').ClsDataPreprocessor
        from mmpretrain.structures import DataSample

        options = dict(num_classes=5, batch_augments=copy.deepcopy(AUGMENTS['either or none']))
        batches = [
            {'inputs': inputs, 'data_samples': [DataSample().set_gt_label(i) for i in range(4)]}
            for _ in range(12)
        ]
    else:
        options = dict(bgr_to_rgb=True)
        batches = [{'inputs': list(inputs)}] * 3
        if task == 'detection':
            kind = pytest.importorskip('mmdet.models').DetDataPreprocessor
        else:
            kind = pytest.importorskip('mmseg.models').SegDataPreProcessor
    preprocessor = kind(mean=[1, 2, 3], std=[2, 3, 4], **options).cuda()
    preprocessor._non_blocking = True
    preprocessor(batches.pop(), task != 'segmentation')
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for batch in batches:
            preprocessor(batch, task != 'segmentation')
    finally:
        torch.cuda.set_sync_debug_mode('default')
