"""Checks of configs without running them."""

import re

import pytest
from config_harness import BASES, CONFIGS, FAMILIES, build_model, config_id, cut_depth
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

# The three libraries' own patterns: fields by `_`, words by `-`, numbers of GPUs and images `8xb2`.
BATCH = r'\d+xb\d+'
PATTERNS = {
    'mmpretrain': (
        rf'[a-z0-9-]+(_in(1|21)k-pre)?_{BATCH}(-\d+e)?_in1k(-\d+px)?'
        r'|[a-z0-9-]+_((mask-)?(kinetics400|sthv2)|in1k|mask)-pre_'
        rf'{BATCH}-\d+x\d+-\d+e_(kinetics400|sthv2|breakfast|coin)'
    ),
    'mmdet': rf'[a-z0-9-]+_[a-z0-9-]+_(simple)?fpn_((ms-crop-)?[13]x|{BATCH}(-lsj)?-\d+ep)_coco',
    'mmseg': rf'[a-z0-9-]+_(in21k-pre_)?[a-z0-9-]+_{BATCH}-\d+k_ade20k-\d+x\d+',
}


@pytest.mark.parametrize('path', BASES, ids=config_id)
def test_base_parses_alone(path):
    assert Config.fromfile(path).to_dict()


@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_has_what_a_launcher_needs(path):
    cfg = Config.fromfile(path)
    assert cfg.default_scope in PATTERNS
    assert cfg.default_hooks.checkpoint.save_best
    assert cfg.env_cfg.mp_cfg.opencv_num_threads == 0
    for split in ('train', 'val', 'test'):
        assert f'{split}_cfg' in cfg
        assert f'{split}_dataloader' in cfg
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    iterations = 'max_iters' in cfg.train_cfg
    assert cfg.log_processor.by_epoch is not iterations
    assert cfg.default_hooks.checkpoint.get('by_epoch', True) is not iterations
    assert cfg.default_hooks.logger.get('log_metric_by_epoch', True) is not iterations


@pytest.mark.parametrize('path', FAMILIES, ids=config_id)
def test_name_and_batch_agree(path):
    cfg = Config.fromfile(path)
    assert re.fullmatch(PATTERNS[cfg.default_scope], path.stem), path.stem
    batch = re.search(r'(\d+)xb(\d+)', path.stem)
    # mmdet's 1x and 3x mean 8 GPUs with two images each.
    gpus, images = map(int, batch.groups()) if batch else (8, 2)
    assert cfg.train_dataloader.batch_size == images
    steps = cfg.optim_wrapper.get('accumulative_counts', 1)
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=gpus * images * steps)


@pytest.mark.parametrize('path', FAMILIES, ids=config_id)
def test_loaders_are_written_out(path):
    cfg = Config.fromfile(path)
    collate = 'default_collate' if cfg.default_scope == 'mmpretrain' else 'pseudo_collate'
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        assert loader.collate_fn.type == collate
        assert loader.pin_memory is True
        assert loader.persistent_workers is True
        assert loader.num_workers > 0


@pytest.mark.parametrize('path', FAMILIES, ids=config_id)
def test_schedule_ends_with_training(path):
    cfg = Config.fromfile(path)
    length = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs
    last = cfg.param_scheduler[-1]
    assert last.by_epoch is ('max_epochs' in cfg.train_cfg)
    assert last.get('end', length) == length
    assert all(milestone < length for milestone in last.get('milestones', ()))


@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_weight_decay_spares_what_it_should(path):
    cfg = Config.fromfile(path)
    cut_depth(cfg.model)
    model = build_model(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    spared = re.compile(r'A_log|A_b_log|\.D$|\.D_b$|cls_token|pos_embed|norm|bias$')
    for name, parameter in model.named_parameters():
        expected_zero = parameter.ndim == 1 or bool(spared.search(name))
        assert (decay[id(parameter)] == 0) is expected_zero, name
