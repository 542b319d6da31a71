"""Files of every origin load, and what happened is reported; unsafe ones are refused."""

import argparse
import collections
import json
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from script_runner import run_script as run

from mmvim.apis import build_model
from mmvim.checkpoints.files import find_weights, read_checkpoint, write_checkpoint
from mmvim.checkpoints.loading import checked_loading, load_weights
from mmvim.errors import CheckpointError
from mmvim.models import MambaVision, Vim

ARCH = dict(embed_dims=16, depth=2, d_state=4)

CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvim.Vim', arch=dict(embed_dims=16, depth=2, d_state=4), img_size={size}),
    head=dict(type='LinearClsHead', num_classes=5, in_channels=16))
"""


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Vim(ARCH, img_size=32)
    torch.nn.init.normal_(model.pos_embed)
    return model


def official(model, prefix=''):
    """The weights with the names that the authors' classifier has."""
    weights = {prefix + k: v.detach().clone() for k, v in model.state_dict().items()}
    return {
        **weights,
        f'{prefix}head.weight': torch.ones(5, 16),
        f'{prefix}head.bias': torch.ones(5),
    }


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w: w,
        lambda w: {'model': w, 'args': argparse.Namespace(lr=1)},
        lambda w: {'state_dict': w, 'epoch': 1},
        lambda w: {'model': {f'module.{k}': v for k, v in w.items()}},
        lambda w: {'module': {f'_orig_mod.{k}': v for k, v in w.items()}},
        lambda w: {'model': {'state_dict': w}},
        lambda w: {f'model.{k}': v for k, v in w.items()},
    ],
    ids=['bare', 'model', 'state_dict', 'module', 'compiled', 'nested', 'prefix'],
)
def test_wrapped_files(model, wrap, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(wrap(official(model)), path)
    other = Vim(ARCH, img_size=32)
    report = load_weights(other, path)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)
    assert report.loaded == len(model.state_dict())
    assert report.missing == ()
    assert report.unexpected == ('head.bias', 'head.weight')
    assert not report.renamed
    assert not report.resized
    # As a config and as a runner loads them.
    pretrained = dict(type='Pretrained', checkpoint=str(path))
    initialised = Vim(ARCH, img_size=32, init_cfg=pretrained)
    initialised.init_weights()
    runner = Runner(
        model=build_model(Config.fromstring(CLASSIFIER.format(size=32), '.py')),
        work_dir=str(tmp_path),
        load_from=str(path),
        default_hooks=dict(logger=None),
        default_scope='mmpretrain',
        experiment_name=str(tmp_path),
    )
    with checked_loading(runner, complete=True):
        runner.load_or_resume()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(initialised.state_dict()[key], value)
        torch.testing.assert_close(runner.model.backbone.state_dict()[key], value)


def test_averaged_weights_are_selectable(model):
    ema = {k: v + 1 for k, v in official(model).items()}
    theirs = {'model': official(model), 'model_ema': ema}
    assert torch.equal(find_weights(theirs)['norm_f.weight'], model.norm_f.weight)
    assert torch.equal(find_weights(theirs, ema=False)['norm_f.weight'], model.norm_f.weight)
    assert torch.equal(find_weights(theirs, ema=True)['norm_f.weight'], model.norm_f.weight + 1)
    # mmengine's hook exchanges them when it saves.
    trained = {f'module.{k}': v for k, v in official(model).items()}
    ours = {'state_dict': ema, 'ema_state_dict': {'steps': torch.tensor(7), **trained}}
    assert torch.equal(find_weights(ours)['norm_f.weight'], model.norm_f.weight + 1)
    assert torch.equal(find_weights(ours, ema=True)['norm_f.weight'], model.norm_f.weight + 1)
    assert torch.equal(find_weights(ours, ema=False)['norm_f.weight'], model.norm_f.weight)
    with pytest.raises(CheckpointError, match='has no averaged weights'):
        find_weights({'model': ema}, ema=True)


def test_mmengine_saves_averages_in_this_way(tmp_path):
    """The exchange that find_weights undoes is what mmengine's hook does."""
    from types import SimpleNamespace

    from mmengine.hooks import EMAHook

    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), iter=0)
    hook = EMAHook()
    hook.before_run(runner)
    hook.ema_model.module.weight.data.fill_(5.0)
    runner.model.weight.data.fill_(3.0)
    content = {'state_dict': runner.model.state_dict()}
    hook.before_save_checkpoint(runner, content)
    assert find_weights(content, ema=True)['weight'] == 5
    assert find_weights(content, ema=False)['weight'] == 3


def test_report(model, tmp_path):
    path = tmp_path / 'x.pth'
    weights = official(model)
    del weights['norm_f.weight']
    weights['surplus'] = torch.zeros(1)
    torch.save({'model': weights}, path)
    classifier = build_model(Config.fromstring(CLASSIFIER.format(size=64), '.py'))
    report = load_weights(classifier, path)
    assert report.renamed['head.weight'] == 'head.fc.weight'
    assert report.renamed['layers.0.mixer.D'] == 'backbone.layers.0.mixer.D'
    assert report.resized == {'backbone.pos_embed': ((1, 5, 16), (1, 17, 16))}
    assert report.missing == ('backbone.norm_f.weight',)
    assert report.unexpected == ('surplus',)
    assert 'resized: 1\n  backbone.pos_embed: (1, 5, 16) -> (1, 17, 16)' in str(report)


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch /tmp/mmvim-must-not-exist',)


def test_refused_files(model, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'model': official(model), 'args': RunsCode()}, path)
    with pytest.raises(CheckpointError, match=r'x\.pth. refused: it contains posix\.system'):
        load_weights(model, path)
    torch.save({'model': official(model), 'c': collections.Counter()}, path)
    assert read_checkpoint(path)['c'] == {}
    path.write_bytes(b'no checkpoint')
    with pytest.raises(CheckpointError, match=r'x\.pth. cannot be read'):
        load_weights(model, path)
    torch.save(official(model), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r'x\.pth. cannot be read'):
        load_weights(model, path)
    torch.save({'epoch': 3}, path)
    with pytest.raises(CheckpointError, match='has no weights'):
        load_weights(model, path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match='holds a list'):
        load_weights(model, path)
    arch = dict(depths=(1, 1, 1, 1), embed_dims=8, stem_dims=8, num_heads=(2, 2))
    torch.save({'state_dict': MambaVision(arch).state_dict()}, path)
    with pytest.raises(CheckpointError, match='does not fit the model'):
        load_weights(model, path)
    (tmp_path / 'x.safetensors').write_bytes(b'{}')
    with pytest.raises(CheckpointError, match='cannot be read'):
        load_weights(model, tmp_path / 'x.safetensors')
    with pytest.raises(CheckpointError, match='does not exist'):
        load_weights(model, tmp_path / 'y.pth')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_written_files_load_again(model, suffix, tmp_path):
    out = tmp_path / f'x{suffix}'
    write_checkpoint(model.state_dict(), out, {'dataset_meta': {'classes': ['a']}})
    other = Vim(ARCH, img_size=32)
    assert load_weights(other, out).loaded == len(model.state_dict())
    torch.testing.assert_close(other.pos_embed, model.pos_embed)
    with pytest.raises(ValueError, match='must end with'):
        write_checkpoint(model.state_dict(), tmp_path / 'x.bin')
    assert list(tmp_path.iterdir()) == [out]


def test_mmengine_reads_safetensors(model, tmp_path):
    """In init_cfg, load_from and the inferencers too."""
    out = tmp_path / 'x.safetensors'
    write_checkpoint(model.state_dict(), out)
    other = Vim(ARCH, img_size=32, init_cfg=dict(type='Pretrained', checkpoint=str(out)))
    other.init_weights()
    torch.testing.assert_close(other.pos_embed, model.pos_embed)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_converter(model, suffix, tmp_path):
    config, source, out = tmp_path / 'c.py', tmp_path / 'x.pth', tmp_path / f'out{suffix}'
    config.write_text(CLASSIFIER.format(size=32))
    torch.save({'model': official(model)}, source)
    result = run('converters/convert_checkpoint.py', config, source, out, '--shape', '32')
    assert result.returncode == 0, result.stderr
    assert 'head.weight -> head.fc.weight' in result.stdout
    assert 'missing: 0' in result.stdout
    assert 'differ by 0' in result.stdout
    again = run('converters/convert_checkpoint.py', config, out, out, '--shape', '32')
    assert again.returncode == 2
    assert '--overwrite replaces it' in again.stderr


@pytest.mark.parametrize(
    ('flags', 'added'), [([], 0), (['--ema'], 1), (['--no-ema'], 0)], ids=['', 'ema', 'no-ema']
)
@pytest.mark.parametrize('exchanged', [False, True], ids=['official', 'EMAHook'])
def test_converter_takes_the_weights_that_it_is_told(model, flags, added, exchanged, tmp_path):
    config, source, out = tmp_path / 'c.py', tmp_path / 'x.pth', tmp_path / 'out.pth'
    config.write_text(CLASSIFIER.format(size=32))
    trained = official(model)
    averaged = {key: value + 1 for key, value in trained.items()}
    content = {'model': trained, 'model_ema': averaged}
    if exchanged:
        # mmengine's hook swaps the two; without a flag what it validated is taken.
        content = {'state_dict': averaged, 'ema_state_dict': trained}
        added = int(flags != ['--no-ema'])
    torch.save(content, source)
    result = run('converters/convert_checkpoint.py', config, source, out, '--shape', '32', *flags)
    assert result.returncode == 0, result.stderr
    converted = torch.load(out)['state_dict']
    torch.testing.assert_close(converted['backbone.norm_f.weight'], model.norm_f.weight + added)


def test_converter_refuses_a_part(model, tmp_path):
    config, source, out = tmp_path / 'c.py', tmp_path / 'x.pth', tmp_path / 'out.pth'
    config.write_text(CLASSIFIER.format(size=32))
    weights = official(model)
    del weights['head.bias']
    torch.save({'model': weights}, source)
    result = run('converters/convert_checkpoint.py', config, source, out, '--shape', '32')
    assert result.returncode == 2
    assert 'lacks 1 parameters of the model: head.fc.bias' in result.stderr
    assert not out.exists()


def test_publish(model, tmp_path):
    import hashlib

    source = tmp_path / 'epoch_1.pth'
    content = {
        'state_dict': model.state_dict(),
        'optimizer': {'state': torch.zeros(100_000)},
        'meta': {'dataset_meta': {'classes': ['a', 'b']}, 'cfg': 'secret = "/home/me"'},
    }
    torch.save(content, source)
    result = run('publish.py', source, tmp_path / 'vim.pth')
    assert result.returncode == 0, result.stderr
    (out,) = tmp_path.glob('vim-*.pth')
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert out.name == f'vim-{digest[:8]}.pth'
    assert digest in result.stdout
    assert out.stat().st_size < 0.5 * source.stat().st_size
    published = torch.load(out, weights_only=True)
    assert set(published) == {'meta', 'state_dict'}
    assert published['meta'] == {'dataset_meta': {'classes': ['a', 'b']}}
    assert json.dumps(published['meta'])
    assert load_weights(Vim(ARCH, img_size=32), out).missing == ()
    assert run('publish.py', source, tmp_path / 'vim.pth').returncode == 2
    assert run('publish.py', source, tmp_path / 'vim.pth', '--ema').returncode == 2
