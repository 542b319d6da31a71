"""MESA self-distillation: the classifier's loss and the hook's teacher."""

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')

from mesa_runs import RandomImages, make_runner, mesa_losses, model_config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope

from mmvim.engine import MesaHook


def build(kind='mmvim.MesaClassifier', seed=0, **kwargs):
    init_default_scope('mmpretrain')
    torch.manual_seed(seed)
    model = MODELS.build(model_config(kind, **kwargs))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_()
    return model


def batch(model, indices=range(8)):
    data = [RandomImages()[i] for i in indices]
    data = dict(
        inputs=[item['inputs'] for item in data],
        data_samples=[item['data_samples'] for item in data],
    )
    data = model.data_preprocessor(data, training=True)
    return data['inputs'], data['data_samples']


def test_without_a_teacher_it_is_an_image_classifier():
    plain, student = build('ImageClassifier'), build(mesa_weight=25.0)
    assert list(plain.state_dict()) == list(student.state_dict())
    student.load_state_dict(plain.state_dict(), strict=True)
    inputs, samples = batch(student)
    for model in (plain.eval(), student.eval()):
        model.result = model(inputs, samples, mode='loss')
    assert student.result == {'loss_cls': plain.result['loss']}
    torch.testing.assert_close(student(inputs), plain(inputs))


def test_loss_of_a_teacher():
    student, teacher = build(mesa_weight=7.0, temperature=2.0).eval(), build(seed=1, mesa_weight=1)
    student.learn_from(teacher.eval())
    inputs, samples = batch(student)
    losses = student(inputs, samples, mode='loss')
    p = (student(inputs).detach().double() / 2).softmax(1)
    q = (teacher(inputs).detach().double() / 2).softmax(1)
    expected = (
        7
        * sum(
            float(b) * math.log(float(b) / float(a))
            for a, b in zip(p.flatten(), q.flatten(), strict=True)
        )
        / len(inputs)
    )
    assert losses['loss_mesa'].item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    teacher.load_state_dict(student.state_dict())
    assert student(inputs, samples, mode='loss')['loss_mesa'].item() == pytest.approx(0, abs=1e-5)


def test_only_the_student_learns():
    student, teacher = build(mesa_weight=7.0).train(), build(seed=1, mesa_weight=7.0).eval()
    teacher.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    student.learn_from(teacher)
    inputs, samples = batch(student)
    student(inputs, samples, mode='loss')['loss_mesa'].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.head.parameters())
    assert student.backbone.patch_embed.conv_down[0].weight.grad.any()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_teacher_is_no_part_of_the_student():
    student, teacher = build(mesa_weight=1.0), build(seed=1, mesa_weight=1.0)
    keys, count = list(student.state_dict()), len(list(student.modules()))
    student.learn_from(teacher)
    assert list(student.state_dict()) == keys
    assert len(list(student.modules())) == count
    assert copy.deepcopy(student).teacher is teacher
    student.learn_from(None)
    pickle.dumps(student)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    teacher = build(seed=1, mesa_weight=1.0).eval()
    grads = []
    for parts in ([range(8)], [range(4), range(4, 8)]):
        student = build(mesa_weight=7.0).eval()  # batch norms apart, halves make up the whole
        student.learn_from(teacher)
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        wrapper = OptimWrapper(optimizer, accumulative_counts=len(parts))
        wrapper.initialize_count_status(student, 0, len(parts))
        before = [p.detach().clone() for p in student.parameters()]
        for part in parts:
            inputs, samples = batch(student, part)
            with wrapper.optim_context(student):
                loss, _ = student.parse_losses(student(inputs, samples, mode='loss'))
            wrapper.update_params(loss)
        grads.append([a - b.detach() for a, b in zip(before, student.parameters(), strict=True)])
    for whole, halves in zip(*grads, strict=True):
        torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'mesa_weight': -1}, 'mesa_weight=-1'),
        ({'mesa_weight': '25'}, "mesa_weight='25'"),
        ({'mesa_weight': 1, 'temperature': 0}, 'temperature=0'),
    ],
)
def test_bad_arguments_of_the_classifier(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize('start', [-0.1, 1.0, '0.25', True])
def test_bad_start(start):
    with pytest.raises(ValueError, match=f'start={start!r}'):
        MesaHook(start)


def spy(runner):
    """Record, at each iteration, the teacher and whether it is in training mode."""
    seen, model = [], runner.model
    loss = model.loss

    def record(*args):
        teacher = model.teacher
        seen.append((runner.epoch, runner.iter, teacher, teacher is not None and teacher.training))
        return loss(*args)

    model.loss = record
    return seen


@pytest.mark.parametrize(('start', 'first'), [(0.5, 3), (0.25, 2), (0.3, 2), (0.0, 1)])
def test_starts_after_the_fraction_of_epochs(start, first, tmp_path):
    runner = make_runner(tmp_path, start=start)
    seen = spy(runner)
    runner.train()
    assert [epoch for epoch, *_ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    average = next(h.ema_model.module for h in runner.hooks if type(h).__name__ == 'EMAHook')
    for epoch, _, teacher, training in seen:
        assert teacher is (average if epoch >= first else None)
        assert training is False
    losses = mesa_losses(runner)
    assert len(losses) == 2 * (4 - first)
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert runner.model.teacher is None


def test_published_epochs():
    """310 epochs and 10 of cooldown: the first epoch (from 0) after a quarter of 310 is 78."""
    for start, first in ((0.25, 78), (0.3, 94)):
        hook = MesaHook(start=start * 310 / 320)
        begun = [epoch for epoch in range(320) if epoch / 320 > hook.start]
        assert begun[0] == first
        assert begun == [epoch for epoch in range(320) if epoch / 310 > start]


def test_iterations(tmp_path):
    runner = make_runner(tmp_path, start=0.5, train_cfg=dict(by_epoch=False, max_iters=6))
    seen = spy(runner)
    runner.train()
    assert [teacher is not None for _, _, teacher, _ in seen] == [False] * 4 + [True] * 2


def test_the_teacher_is_the_moving_average(tmp_path):
    runner = make_runner(tmp_path, start=0.0)
    seen, students, teachers = [], [], []
    loss = runner.model.loss

    def record(*args):
        students.append(copy.deepcopy(runner.model.state_dict()))
        if runner.model.teacher is not None:
            seen.append(runner.iter)
            teachers.append(copy.deepcopy(runner.model.teacher.state_dict()))
        return loss(*args)

    runner.model.loss = record
    runner.train()
    assert seen == list(range(2, 8))
    names = [name for name, value in students[0].items() if value.is_floating_point()]
    expected = {name: students[1][name] for name in names}  # after the first update, a copy
    for i, student in enumerate(students[2:], start=2):
        expected = {name: 0.5 * expected[name] + 0.5 * student[name] for name in names}
        for name in names:
            torch.testing.assert_close(teachers[i - 2][name], expected[name], msg=name)


class StopAfter(Hook):
    """End the run as a crash after an epoch would."""

    priority = 'LOWEST'

    def __init__(self, epochs):
        self.epochs = epochs

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == self.epochs:
            raise KeyboardInterrupt


def test_resuming_gives_the_same_weights(tmp_path):
    model = model_config(mesa_weight=25.0)
    model['backbone']['drop_path_rate'] = 0.0  # other random numbers after resuming
    whole = make_runner(tmp_path / 'whole', model=model)
    whole.train()
    broken = make_runner(tmp_path / 'broken', model=model)
    broken.register_hook(StopAfter(3))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_runner(
        tmp_path / 'resumed',
        model=model,
        resume=True,
        load_from=str(tmp_path / 'broken' / 'epoch_3.pth'),
    )
    seen = spy(resumed)
    resumed.train()
    assert [(epoch, teacher is not None) for epoch, _, teacher, _ in seen] == [(3, True)] * 2
    first, second = (
        torch.load(tmp_path / name / 'epoch_4.pth', weights_only=False)
        for name in ('whole', 'resumed')
    )
    for key in ('state_dict', 'ema_state_dict'):
        for name, value in first[key].items():
            torch.testing.assert_close(value, second[key][name], msg=f'{key} {name}')


def test_mixed_precision(tmp_path):
    runner = make_runner(
        tmp_path,
        start=0.25,
        optim_wrapper=dict(type='mmvim.CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
    )
    dtypes, divergence = [], runner.model._divergence

    def record(logits, target):
        dtypes.append((logits.dtype, target.dtype))
        loss = divergence(logits, target)
        assert loss.dtype == torch.float32
        return loss

    runner.model._divergence = record
    runner.train()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 4
    assert all(math.isfinite(loss) for loss in mesa_losses(runner))
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_needs_a_student_and_a_teacher(tmp_path):
    runner = make_runner(tmp_path / 'a', model=model_config('ImageClassifier'))
    with pytest.raises(ValueError, match=r"needs a model of type 'mmvim.MesaClassifier', not 'Ima"):
        runner.train()
    runner = make_runner(tmp_path / 'b', custom_hooks=[dict(type='mmvim.MesaHook')])
    with pytest.raises(ValueError, match='needs an EMAHook as well'):
        runner.train()


@pytest.mark.timeout(300)
def test_two_processes(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join((str(here.parents[1]), os.environ.get('PYTHONPATH', '')))
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']
    done = subprocess.run(
        [*command, str(here / 'mesa_runs.py'), str(tmp_path)],
        env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split('rank ')[1:]) == ['0 agrees\n', '1 agrees\n']


def test_a_detector_s_user_needs_no_mmpretrain():
    program = 'import mmvim.models, mmvim.engine, sys; assert "mmpretrain" not in sys.modules'
    subprocess.run([sys.executable, '-c', program], check=True)
    assert isinstance(build(mesa_weight=1.0), nn.Module)
