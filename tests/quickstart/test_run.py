"""The quickstart driver, its failures, and one shortened run from end to end."""

import json
import os
import subprocess
import sys
import time

import pytest


def test_every_quickstart_has_its_config(run_script, repository):
    for quickstart in run_script.QUICKSTARTS.values():
        assert (repository / quickstart.config).is_file()


def test_a_failing_step_says_what_to_do(run_script, capfd):
    with pytest.raises(run_script.StepFailed, match=r'data: failed with exit code 2.*try this'):
        run_script.step('data', 'tools/quickstart/make_data.py', 'nonsense', hint='try this')
    assert '+ python tools/quickstart/make_data.py nonsense' in capfd.readouterr().out


def test_the_newest_best_checkpoint_is_taken_and_older_ones_go(run_script, tmp_path):
    now = time.time()
    for name, age in (('best_epoch_9.pth', 100), ('best_epoch_3.pth', 1), ('epoch_30.pth', 0)):
        (tmp_path / name).write_text('')
        os.utime(tmp_path / name, (now - age, now - age))
    assert run_script.best_checkpoint(tmp_path, now - 50).name == 'best_epoch_3.pth'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['best_epoch_3.pth', 'epoch_30.pth']
    with pytest.raises(run_script.StepFailed, match=r'no best_\*\.pth'):
        run_script.best_checkpoint(tmp_path, now)


def test_another_data_folder_reaches_every_loader(run_script, repository, tmp_path):
    assert run_script.data_options('det', repository / 'data' / 'quickstart') == []
    options = dict(o.split('=') for o in run_script.data_options('det', tmp_path))
    for split in ('train', 'val', 'test'):
        assert options[f'{split}_dataloader.dataset.data_root'] == f'{tmp_path}/det'
    for split in ('val', 'test'):
        file = options[f'{split}_evaluator.ann_file']
        assert file == f'{tmp_path}/det/annotations/instances_{split}.json'


def test_another_recipe_runs_in_the_steps_of_the_task(
    run_script, repository, monkeypatch, tmp_path
):
    steps = []

    def step(title, *arguments, hint):
        steps.append(arguments)
        if title == 'training':
            (tmp_path / 'cls').mkdir()
            (tmp_path / 'cls' / 'best_epoch_1.pth').write_text('')
        return 1.0

    config = 'configs/quickstart/mambavision_digits_cls.py'
    monkeypatch.setattr(run_script, 'step', step)
    monkeypatch.chdir(repository)
    monkeypatch.setattr(
        'sys.argv', ['run.py', 'cls', '--work-dir', str(tmp_path), '--config', config]
    )
    assert run_script.main() == 0
    assert [arguments[0].rpartition('/')[2] for arguments in steps] == [
        'make_data.py',
        'train.py',
        'test.py',
        'report.py',
    ]
    assert steps[1][1] == steps[2][1] == config
    assert json.loads((tmp_path / 'cls' / 'run.json').read_text())['config'] == config


def test_a_missing_library_is_named(run_script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run_script.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr('sys.argv', ['run.py', 'seg', '--work-dir', str(tmp_path)])
    assert run_script.main() == 1
    assert 'mmseg is not installed' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_quickstart_from_end_to_end(repository, tmp_path):
    for package in ('sklearn', 'skimage', 'matplotlib', 'mmpretrain'):
        pytest.importorskip(package)
    command = [sys.executable, 'tools/quickstart/run.py', 'cls']
    command += ['--work-dir', str(tmp_path / 'work'), '--data-dir', str(tmp_path / 'data')]
    command += ['--cfg-options', 'train_cfg.max_epochs=6', 'param_scheduler.1.end=6']
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    work = tmp_path / 'work' / 'cls'
    metrics = json.loads((work / 'metrics.json').read_text())
    assert metrics['test']['accuracy/top1'] > 85
    assert f'{metrics["test"]["accuracy/top1"]:.2f} %' in done.stdout
    assert (work / metrics['checkpoint']).is_file()
    for name in ('training_curve.png', 'predictions.png'):
        assert (work / name).stat().st_size > 10_000
