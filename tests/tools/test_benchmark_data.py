"""The benchmark of data pipelines."""

import time

import numpy as np
import pytest
from script_runner import run_script
from torch.utils.data import DataLoader, Dataset

pytest.importorskip('mmpretrain')
Image = pytest.importorskip('PIL.Image')

CONFIG = """
default_scope = 'mmpretrain'
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root='data',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a', 'b'):
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f'{i}.png')
    (tmp_path / 'config.py').write_text(CONFIG)
    return 'config.py'


def test_rates_and_shares(config):
    done = run_script('benchmark/data.py', config, '--samples', 9, '--workers', 0, '--need', 1e6)
    assert done.returncode == 0, done.stderr
    assert '0 workers:' in done.stdout
    shares = [float(line.split()[0]) for line in done.stdout.splitlines() if ' %  ' in line]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert '1e+06 samples/s need' in done.stdout


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (('--split', 'val'), 'config.py has no val_dataloader'),
        (('--cfg-options', 'train_dataloader.batch_size=6'), 'make batch_size smaller'),
        (('--cfg-options', 'train_dataloader.batch_size.of=6'), '--cfg-options cannot be merged'),
    ],
)
def test_bad_configs(config, option, message):
    done = run_script('benchmark/data.py', config, '--workers', 0, *option)
    assert done.returncode == 2
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


class Slow(Dataset):
    """Samples that take a tenth of a second each."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(0.1)
        return index


def test_workers_that_begin_together_do_not_count_as_faster(load_script):
    """Four workers make four batches of two in 0.2 s: 40 samples a second."""
    loader = DataLoader(
        Slow(), batch_size=2, num_workers=4, collate_fn=lambda x: {'data_samples': x}
    )
    rate = load_script('benchmark/data.py').measure(loader, 6)
    assert rate < 48
