"""One command compares a downloaded file with its model, and says what differs."""

import hashlib

import pytest
import torch
from script_runner import run_script

from mmvim.models import Vim, VMamba

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1))
CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', backbone=dict(type='mmvim.VMamba', arch={arch!r}),
    head=dict(type='LinearClsHead', num_classes=5, in_channels=128))
"""


@pytest.fixture(scope='module')
def official():
    """The weights with the names of the authors' classifier."""
    weights = VMamba(ARCH).state_dict()
    named = {('classifier.' if k[:5] == 'norm.' else '') + k: v for k, v in weights.items()}
    head = {'classifier.head.weight': torch.zeros(5, 128), 'classifier.head.bias': torch.zeros(5)}
    return {**named, **head}


def check(folder, content, *flags, name='x.pth', arch=ARCH):
    (folder / 'config.py').write_text(CONFIG.format(arch=arch))
    torch.save(content, folder / name)
    script = 'converters/check_checkpoint.py'
    result = run_script(script, folder / 'config.py', folder / name, *flags)
    assert not result.stderr or result.returncode == 2
    return result.returncode, result.stdout


def test_the_right_file(official, tmp_path):
    code, out = check(tmp_path, {'model': official, 'model_ema': official, 'epoch': 264}, '--ema')
    assert code == 0, out
    assert hashlib.sha256((tmp_path / 'x.pth').read_bytes()).hexdigest() in out
    assert f'size: {(tmp_path / "x.pth").stat().st_size} bytes' in out
    assert "under 'model'; averaged weights under 'model_ema'; besides epoch" in out
    assert 'MISSING' not in out
    assert 'The checkpoint fits the model.' in out
    code, out = check(tmp_path, {f'module.{k}': v for k, v in official.items()}, '--all')
    assert code == 0
    assert "without a container; each name begins with 'module.'" in out
    assert 'classifier.head.weight -> head.fc.weight' in out


def test_what_differs_is_listed(official, tmp_path):
    """Several faults at once, which loading would report one by one."""
    weights = dict(official)
    weights['patch_embed.first.weight'] = weights.pop('patch_embed.0.weight')
    weights['classifier.head.bias'] = torch.zeros(7)
    for i in (0, 3):
        weights[f'layers.{i}.blocks.0.op.Ds'] = torch.zeros(i + 1)
    code, out = check(tmp_path, weights)
    assert code == 1
    for lines in (
        'MISSING in the file: 1\n  backbone.patch_embed.0.weight',
        'UNEXPECTED in the file: 1\n  patch_embed.first.weight',
        'OF ANOTHER SHAPE: 3\n'
        '  backbone.layers.0.blocks.0.op.Ds: (1,) in the file, (64,) in the model\n'
        '  backbone.layers.3.blocks.0.op.Ds: (4,) in the file, (512,) in the model\n'
        '  head.fc.bias: (7,) in the file, (5,) in the model',
        'The checkpoint does NOT fit the model.',
    ):
        assert lines in out, out


def test_files_of_other_models(official, tmp_path):
    code, out = check(tmp_path, {'model': official}, arch=dict(ARCH, depths=(1, 1, 2, 1)))
    assert code == 1
    assert 'MISSING in the file: 18\n  backbone.layers.2.blocks.1.mlp.fc1.bias' in out
    assert '… and 8 more (--all)' in out
    weights = Vim(dict(embed_dims=16, depth=2), img_size=32).state_dict()
    code, out = check(tmp_path, weights)
    assert code == 1
    assert 'fit: 0 tensors' in out
    assert 'init_cfg' in out


def test_unreadable_files(official, tmp_path):
    check(tmp_path, {'model': official})
    whole = (tmp_path / 'x.pth').read_bytes()
    (tmp_path / 'x-0123abcd.pth').write_bytes(whole)
    (tmp_path / 'y.pth').write_bytes(whole[:-2000])
    for name, message in (
        ('x-0123abcd.pth', 'and its name says 0123abcd'),
        ('y.pth', 'cannot be read'),
        ('z.pth', 'does not exist'),
    ):
        result = run_script(
            'converters/check_checkpoint.py', tmp_path / 'config.py', tmp_path / name
        )
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
