"""The backbone in other people's configs, and our configs as a base of theirs."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from config_harness import REPO, build_model, run, shrink
from mmengine.config import Config
from mmengine.runner import Runner

STRANGERS = {
    'mmdet': """
        _base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
        model = dict(
            backbone=dict(
                _delete_=True, type='mmvim.Vim', arch='tiny', out_type='featmap',
                out_indices=(5, 11, 17, 23)),
            neck=dict(in_channels=[192, 192, 192, 192]))
    """,
    'mmdet-vmamba': """
        _base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
        model = dict(
            backbone=dict(
                _delete_=True, type='mmvim.VMamba', arch='tiny', out_type='featmap',
                out_indices=(0, 1, 2, 3)))
    """,
    'mmdet-faster-rcnn': """
        _base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
        model = dict(
            backbone=dict(_delete_=True, type='mmvim.Vim', arch='tiny', out_type='featmap'),
            neck=dict(
                _delete_=True, type='mmvim.SimpleFPN', in_channels=192, out_channels=256,
                num_outs=5))
    """,
    'mmseg': """
        _base_ = 'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'
        model = dict(
            pretrained=None,
            backbone=dict(
                _delete_=True, type='mmvim.Vim', arch='tiny', out_type='featmap',
                out_indices=(5, 11, 17, 23)),
            decode_head=dict(in_channels=[192, 192, 192, 192]),
            auxiliary_head=dict(in_channels=192))
    """,
    'mmpretrain': """
        _base_ = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'
        model = dict(backbone=dict(_delete_=True, type='mmvim.Vim', arch='tiny'))
    """,
}


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize('name', STRANGERS)
def test_strangers_config(name, miniature_data, tmp_path):
    path = write(tmp_path / 'stranger.py', STRANGERS[name])
    cfg = shrink(Config.fromfile(path), miniature_data, tmp_path / 'run')
    assert cfg.model.backbone.type == ('mmvim.VMamba' if 'vmamba' in name else 'mmvim.Vim')
    # Outputs of a layer before the last one leave the norm at the end without a use: the default
    # `out_norm='final'` norms the last layer's output only, and all these use that layer.
    assert run(cfg)
    shutil.rmtree(tmp_path / 'run')


def test_our_config_as_a_base(tmp_path):
    path = write(
        tmp_path / 'mine.py',
        """
        _base_ = 'mmvim::vim/vim-tiny_8xb128_in1k.py'
        model = dict(backbone=dict(drop_path_rate=0.1), head=dict(num_classes=10))
        """,
    )
    cfg = Config.fromfile(path)
    ours = Config.fromfile(REPO / 'configs/vim/vim-tiny_8xb128_in1k.py')
    assert cfg.optim_wrapper == ours.optim_wrapper
    assert cfg.model.backbone.drop_path_rate == 0.1
    model = build_model(cfg)
    assert model.head.fc.out_features == 10


def test_misspelt_key_of_the_backbone():
    cfg = Config.fromfile(REPO / 'configs/vim/vim-tiny_8xb128_in1k.py')
    cfg.model.backbone.drop_path = 0.1
    with pytest.raises(TypeError, match='drop_path'):
        build_model(cfg)


def test_resolves_in_fresh_processes(tmp_path):
    program = """
        import sys
        from mmengine.config import Config
        from mmengine.registry import MODELS, init_default_scope
        cfg = Config.fromfile('config.py')
        assert ('mmvim' in sys.modules) is ('custom_imports' in cfg)
        init_default_scope('mmpretrain')
        print(type(MODELS.build(cfg.model).backbone).__module__)
    """
    cases = [('mmvim.Vim', ''), ('Vim', "custom_imports = dict(imports=['mmvim'])")]
    processes = []
    for name, extra in cases:
        folder = tmp_path / name
        folder.mkdir()
        write(
            folder / 'config.py',
            f"""
            _base_ = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'
            {extra}
            model = dict(backbone=dict(_delete_=True, type='{name}', arch='tiny'))
            """,
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, '-c', textwrap.dedent(program)],
                cwd=folder,
                env={**os.environ, 'PYTHONPATH': str(REPO)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.split()[-1] == 'mmvim.models.backbones.vim'


def official_checkpoint(path, arch, **kwargs):
    """Write a file with the keys and wrapping of the official ones."""
    from mmvim import Vim

    torch.manual_seed(1)
    backbone = Vim(arch=arch, **kwargs)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.02)
    weights = backbone.state_dict()
    weights['head.weight'] = torch.randn(1000, backbone.embed_dims)
    weights['head.bias'] = torch.randn(1000)
    torch.save({'model': dict(weights), 'optimizer': {}, 'epoch': 299}, path)
    return weights


@pytest.mark.parametrize(
    'config',
    [
        'vim-tiny-stride8_in1k-pre_8xb128-30e_in1k',
        'mask-rcnn_vim-tiny_simplefpn_1x_coco',
        'cascade-mask-rcnn_vim-tiny_simplefpn_8xb8-lsj-100ep_coco',
        'vim-tiny_upernet_8xb2-160k_ade20k-512x512',
    ],
)
def test_starts_from_official_weights(config, tmp_path):
    weights = official_checkpoint(tmp_path / 'official.pth', 'tiny')
    cfg = Config.fromfile(REPO / f'configs/vim/{config}.py')
    owner = cfg.model if 'init_cfg' in cfg.model else cfg.model.backbone
    assert owner.init_cfg.checkpoint.startswith('https://huggingface.co/hustvl/Vim-tiny-midclstok/')
    owner.init_cfg.checkpoint = str(tmp_path / 'official.pth')
    model = build_model(cfg)
    model.init_weights()
    own = model.backbone.state_dict()
    for name, value in weights.items():
        if name in own and name != 'pos_embed':
            torch.testing.assert_close(own[name], value, msg=name)
    side = {'mmpretrain': 27, 'mmdet': 64 if 'lsj' in config else 14, 'mmseg': 32}
    assert own['pos_embed'].shape == (1, side[cfg.default_scope] ** 2 + 1, 192)
    middle = own['pos_embed'][0, side[cfg.default_scope] ** 2 // 2]
    torch.testing.assert_close(middle, weights['pos_embed'][0, 98])
    if cfg.default_scope == 'mmpretrain':
        torch.testing.assert_close(model.head.fc.weight, weights['head.weight'])


def test_tests_official_weights(miniature_data, tmp_path):
    arch = dict(embed_dims=192, depth=2)
    weights = official_checkpoint(tmp_path / 'official.pth', arch)
    cfg = Config.fromfile(REPO / 'configs/vim/vim-tiny_8xb128_in1k.py')
    cfg = shrink(cfg, miniature_data, tmp_path)
    cfg.custom_hooks = []
    cfg.load_from = str(tmp_path / 'official.pth')
    runner = Runner.from_cfg(cfg)
    assert 'accuracy/top1' in runner.test()
    torch.testing.assert_close(runner.model.head.fc.weight, weights['head.weight'])
    torch.testing.assert_close(
        runner.model.backbone.layers[1].mixer.A_b_log, weights['layers.1.mixer.A_b_log']
    )
