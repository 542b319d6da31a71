"""Scalars of runs are read and drawn."""

import json
from pathlib import Path

import pytest

pytest.importorskip('matplotlib')

from script_runner import run_script

from mmvim.analysis import draw_runs, read_run


def write(work_dir: Path, time: str, loss: float, by_epoch: bool = True) -> Path:
    log = work_dir / time / 'vis_data'
    log.mkdir(parents=True)
    lines = []
    for step in range(10, 61, 10):
        entry = {'lr': 1e-3, 'loss': loss / step, 'time': 0.5, 'memory': step, 'step': step}
        lines.append({**entry, 'epoch': (step + 19) // 20} if by_epoch else entry)
        if step % 20 == 0:
            accuracy = {20: 50.0, 40: 90.0, 60: 80.0}[step]
            lines.append({'accuracy/top1': accuracy, 'step': step // 20 if by_epoch else step})
    (log / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    return work_dir


@pytest.mark.parametrize('by_epoch', [True, False])
def test_validations_are_placed_at_iterations(tmp_path, by_epoch):
    write(tmp_path / 'run', '20200101_000000', 9.0)
    run = read_run(write(tmp_path / 'run', '20210101_000000', 2.0, by_epoch))
    assert run.series('accuracy/top1') == ([20, 40, 60], [50.0, 90.0, 80.0])
    assert run.series('loss')[1][0] == 0.2
    summary = run.summary()
    assert summary['iterations'] == 60
    assert summary['seconds_per_iteration'] == 0.5
    assert summary['memory_mib'] == 60
    assert summary['metrics'] == {
        'accuracy/top1': {'highest': 90.0, 'at_iteration': 40, 'last': 80.0}
    }


def test_resumptions_are_joined(tmp_path):
    """Epochs of 13 iterations, logged every 5, stopped after the second and resumed from it."""

    def log(time, steps, validations):
        folder = tmp_path / 'run' / time
        (folder / 'vis_data').mkdir(parents=True)
        lines = [
            *((s, {'loss': 1 / s, 'step': s, 'epoch': -(-s // 13), 'iter': s}) for s in steps),
            *((13 * e + 0.5, {'accuracy': float(e), 'step': e}) for e in validations),
        ]
        text = '\n'.join(json.dumps(entry) for _, entry in sorted(lines, key=lambda x: x[0]))
        (folder / 'vis_data' / 'scalars.json').write_text(text)
        (folder / f'{time}.log').write_text('INFO - Epoch(train)   [1][ 5/13]  lr: 1.0e-03')

    log('20200101_000000', (5, 10, 18, 23, 31, 36), (1, 2))
    log('20200102_000000', (31, 36, 44, 49), (3, 4))
    run = read_run(tmp_path / 'run')
    assert run.series('loss')[0] == [5, 10, 18, 23, 31, 36, 44, 49]
    assert run.series('accuracy') == ([13, 26, 39, 52], [1.0, 2.0, 3.0, 4.0])
    assert run.summary()['iterations'] == 49
    log('20200103_000000', (5, 10), (1,))  # anew
    assert read_run(tmp_path / 'run').series('accuracy') == ([13], [1.0])


@pytest.mark.parametrize('by_epoch', [True, False])
def test_validation_that_is_made_up_for(tmp_path, by_epoch):
    """A run resumed from a checkpoint that was saved before its validation validates first."""
    write(tmp_path / 'run', '20200101_000000', 9.0, by_epoch)
    log = tmp_path / 'run/20210101_000000/vis_data'
    log.mkdir(parents=True)
    train = {'loss': 0.1, 'step': 50, **({'epoch': 3} if by_epoch else {})}
    lines = [{'accuracy/top1': 95.0, 'step': 2 if by_epoch else 40}, train]
    text = 'Epoch(train)  [3][10/20]' if by_epoch else 'Iter(train) [50/60]'
    (log.parent / 'x.log').write_text(text)
    (log / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    assert read_run(tmp_path / 'run').series('accuracy/top1') == ([20, 40], [50.0, 95.0])


def test_a_test_after_training_does_not_hide_it(tmp_path):
    write(tmp_path / 'run', '20210101_000000', 2.0)
    test = tmp_path / 'run' / '20220101_000000' / 'vis_data'
    test.mkdir(parents=True)
    (test / 'scalars.json').write_text(json.dumps({'accuracy/top1': 70.0, 'step': 3}))
    assert read_run(tmp_path / 'run').summary()['iterations'] == 60


def test_draw(tmp_path):
    runs = [read_run(write(tmp_path / name, '20210101_000000', 2.0)) for name in 'ab']
    out = draw_runs(runs, tmp_path / 'curves.png', smooth=3)
    assert out.stat().st_size > 10_000
    with pytest.raises(KeyError, match=r"a has no 'top9'; it has accuracy/top1, loss, lr"):
        draw_runs(runs, tmp_path / 'no.png', ['top9'])
    assert not (tmp_path / 'no.png').exists()


def run(*args):
    return run_script('analysis/analyze_logs.py', *args)


def test_tool(tmp_path):
    work_dir = write(tmp_path / 'run', '20210101_000000', 2.0)
    result = run(work_dir, '--out', tmp_path / 'x.png')
    assert result.returncode == 0, result.stderr
    assert 'highest 90 at 40, last 80' in result.stdout
    assert (tmp_path / 'x.png').is_file()
    again = run(work_dir, '--out', tmp_path / 'x.png')
    assert "x.png' exists; --overwrite replaces it" in again.stderr
    assert run(work_dir, '--out', tmp_path / 'x.png', '--overwrite').returncode == 0
    assert run(work_dir, '--out', tmp_path / 'y.png', '--keys', 'top9').returncode == 2
    flat = run(work_dir, '--out', tmp_path / 'y.png', '--smooth', 0)
    assert '--smooth must be at least 1, not 0' in flat.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['run', 'x.png']
    assert json.loads(run(work_dir, '--json').stdout)[0]['iterations'] == 60


def test_tool_names_what_is_wrong(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2
    assert 'is no work directory of a training run' in result.stderr
    (tmp_path / 'scalars.json').write_text('{"step": 1}\n{"lo')
    assert 'line 2 of' in run(tmp_path / 'scalars.json').stderr
    (tmp_path / 'scalars.json').write_text('{"step": 1}\n')
    assert 'has no entry of a training loop' in run(tmp_path / 'scalars.json').stderr
