"""Data, config and command lines for a run that takes a second."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.runner import Runner

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STARTS = itertools.count()

CONFIG = """
default_scope = 'toytask'
custom_imports = dict(imports=['toy'], allow_failed_imports=False)
data_root = {root!r}
model = dict(type='ToyModel', backbone=dict(type='ToyBackbone', arch='tiny'))
dataset = dict(
    type='ToyDataset', data_root=data_root, ann_file='train.json',
    data_prefix=dict(img_path='vectors'), pipeline=[dict(type='LoadVector')])
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True), dataset=dataset)
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(type='ToyMetric')
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
param_scheduler = dict(type='MultiStepLR', milestones=[1], gamma=0.5)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
"""


@pytest.fixture(scope='session')
def load_script():
    """Import a script of tools/ as a module; sys.path stays as it is."""

    def load(name: str):
        path = list(sys.path)
        script = ROOT / 'tools' / name
        spec = importlib.util.spec_from_file_location(name.replace('/', '_')[:-3], script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        sys.path[:] = path
        return module

    return load


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A directory with ``config.py`` and the data that it names; the current directory."""
    root = tmp_path / 'data'
    (root / 'vectors').mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(16):
        label = i % 3
        vector = rng.normal(size=4) + 3 * np.eye(4)[label]
        np.save(root / 'vectors' / f'{i}.npy', vector)
        samples.append({'file': f'{i}.npy', 'label': label})
    (root / 'train.json').write_text(json.dumps({'samples': samples}))
    (tmp_path / 'config.py').write_text(CONFIG.format(root=str(root)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    # Both take longer than the training: asking compilers for their versions, and formatting the
    # logged config.
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False))
    # Runners that start in the same second would share a logger.
    setup_env = Runner.setup_env

    def setup_env_once(self, env_cfg):
        setup_env(self, env_cfg)
        self._timestamp += f'_{next(STARTS)}'

    monkeypatch.setattr(Runner, 'setup_env', setup_env_once)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MMVIM_DEBUG'):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run_script():
    """Run a script of ``tools/`` as a user would, with the toy task importable."""

    def run(script: str, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
        interpreter = [sys.executable] if script.endswith('.py') else ['bash']
        environment = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join((str(HERE), os.environ.get('PYTHONPATH', ''))),
            'OMP_NUM_THREADS': '1',
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
            **env,
        }
        return subprocess.run(
            [*interpreter, str(ROOT / 'tools' / script), *args],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def fails(capsys):
    """Run a launcher function that must end with one line on stderr, and return the line."""

    def check(main, *args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(list(args))
        assert exit_info.value.code == 2
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')
        ]
        assert len(lines) == 1
        return lines[0]

    return check
