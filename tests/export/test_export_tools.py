"""The command lines of the export, for every task."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from script_runner import run_script

from mmvim.apis import build_model
from mmvim.export.formats import METADATA

ROOT = Path(__file__).parents[2]
TASKS = ('cls', 'det', 'seg')
CONFIGS = {task: ROOT / f'configs/quickstart/vim_digits_{task}.py' for task in TASKS}


@pytest.mark.parametrize('task', CONFIGS)
def test_every_task(task, tmp_path):
    out = tmp_path / 'm.ts'
    result = run_script('export/export.py', CONFIGS[task], out, '--shape', 64, 96, '--report')
    assert result.returncode == 0, result.stderr
    assert 'torchscript' in result.stdout
    assert 'input 3x3x64x96' in result.stdout
    *_, eager, exported = (line.split() for line in result.stdout.splitlines())
    assert eager[-3] == '0.0e+00'
    assert exported[0] == 'm.ts'
    assert float(exported[-3]) < 1e-4
    assert 0 < float(exported[-2]) < float(exported[-1])
    files = {METADATA: ''}
    given = torch.jit.load(str(out), _extra_files=files)(torch.rand(2, 3, 64, 96))
    assert b'"mean"' in files[METADATA]
    shapes = [tuple(x.shape) for x in ([given] if isinstance(given, torch.Tensor) else given)]
    channels = {'cls': 10, 'seg': 11}
    if task == 'det':
        assert len(shapes) > 1
        assert len({shape[1] for shape in shapes}) == 1
    else:
        assert shapes[0][:2] == (2, channels[task])
    again = run_script('export/export.py', CONFIGS[task], out, '--shape', 64, 96)
    assert again.returncode == 2
    assert 'exists; it is not overwritten' in again.stderr


def test_bad_command_lines(tmp_path):
    def error(*args):
        result = run_script('export/export.py', CONFIGS['cls'], *args)
        assert result.returncode == 2
        return result.stderr

    assert 'must end with one of .onnx, .ts, .pt2' in error(tmp_path / 'm.bin')
    assert '--int8 quantises ONNX files' in error(tmp_path / 'm.ts', '--int8', tmp_path / 'i.onnx')
    options = '--int8-static', tmp_path / 'i.onnx'
    assert 'need each other' in error(tmp_path / 'm.onnx', *options)
    assert 'float32 files' in error(tmp_path / 'm.onnx', *options, '--dtype', 'float16')
    assert 'OUT must end with .onnx' in error(tmp_path / 'm.ts', '--stream')
    assert 'not a Vim' in error(tmp_path / 'm.onnx', '--stream', '--shape', 32)
    assert '--shape takes one or two' in error(tmp_path / 'm.ts', '--shape', 0)
    assert 'does not exist' in error(tmp_path / 'm.ts', '--weights', tmp_path / 'no.pth')
    assert list(tmp_path.iterdir()) == []


def test_accuracy_of_files(tmp_path):
    pytest.importorskip('sklearn')
    from mmvim.datasets import quickstart

    quickstart.prepare('cls', tmp_path / 'data', sizes=dict(train=4, val=2, test=12))
    torch.manual_seed(0)
    weights = tmp_path / 'x.pth'
    folders = (tmp_path / 'data/cls/test').iterdir()
    counts = {folder.name: len(list(folder.glob('*.png'))) for folder in folders}
    frequent = max(counts, key=counts.get)
    # A model that always says the same.
    weight = build_model(Config.fromfile(CONFIGS['cls'])).state_dict()
    weight['head.fc.bias'][int(frequent)] = 1000.0
    torch.save(weight, weights)
    out = tmp_path / 'm.ts'
    export = ('--shape', 32, '--weights', weights)
    assert run_script('export/export.py', CONFIGS['cls'], out, *export).returncode == 0
    options = [f'test_dataloader.{key}' for key in ('num_workers=0', 'persistent_workers=False')]
    options.append('test_dataloader.batch_size=5')
    options.append(f'test_dataloader.dataset.data_root={tmp_path / "data" / "cls"}')
    result = run_script(
        'export/evaluate.py',
        out,
        *('--model', CONFIGS['cls'], '--shape', 32, '--weights', weights, '--repeats', 1),
        *('--accuracy', '--cfg-options', *options),
    )
    assert result.returncode == 0, result.stderr
    eager, exported = (line.split()[-2:] for line in result.stdout.splitlines()[-2:])
    assert eager[1] == exported[1]
    assert float(exported[1]) == pytest.approx(100 * counts[frequent] / 12, abs=0.01)
    assert 'does not exist' in run_script('export/evaluate.py', tmp_path / 'no.ts').stderr
    assert '--accuracy needs --model' in run_script('export/evaluate.py', out, '--accuracy').stderr
