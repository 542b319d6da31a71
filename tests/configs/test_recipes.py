"""Every recipe is what the tables of published numbers say, setting by setting."""

import pytest
from config_harness import CONFIGS, FAMILIES, config_id
from recipes import READ, actual, differences, expected, fits, table


@pytest.mark.parametrize('path', FAMILIES, ids=config_id)
def test_recipe_is_the_published_one(path):
    assert not differences(actual(path), expected(path))


@pytest.mark.parametrize('folder', ['_base_', *sorted({path.parent.name for path in FAMILIES})])
def test_entries_have_a_source_and_a_recipe(folder):
    for entry in table(folder):
        assert entry['source'].strip()
        recipes = [path for path in FAMILIES if folder in ('_base_', path.parent.name)]
        assert any(fits(entry, path) for path in recipes), entry['source']


def test_any_change_is_noticed():
    wanted = dict(a=[dict(b=1e-3, c=(1, 2))], d='RGB', e=True, f=None)
    assert not differences(dict(wanted), wanted)
    for changed in (
        dict(wanted, a=[dict(b=1.001e-3, c=(1, 2))]),
        dict(wanted, a=[dict(b=1e-3, c=(2, 1))]),
        dict(wanted, a=[dict(b=1e-3)]),
        dict(wanted, a=[]),
        dict(wanted, d='BGR'),
        dict(wanted, e=1),
        dict(wanted, f=0),
        dict(wanted, g=1),
        {key: value for key, value in wanted.items() if key != 'f'},
    ):
        assert differences(changed, wanted), changed


def test_whatever_a_run_reads_is_compared():
    """A key that only one recipe has must be known as a variable, or be compared."""
    from mmengine.config import Config

    variables = {
        'augmentations', 'backend_args', 'bgr_mean', 'bgr_std', 'crop_size', 'data_root',
        'dataset_type', 'image_size', 'img_ratios', 'label_file', 'loader', 'mean', 'norm_cfg',
        'num_classes', 'num_frames', 'pipeline', 'scales', 'stage_ious', 'stage_stds', 'std',
        'step', 'test_pipeline', 'train_pipeline', 'val_pipeline', 'vis_backends',
    }  # fmt: skip
    for path in FAMILIES:
        assert set(Config.fromfile(path)) <= variables | set(READ), path


@pytest.mark.parametrize('path', [p for p in CONFIGS if p.parent.name == 'own_data'], ids=config_id)
def test_the_schedule_of_own_data(path):
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    segments = 'upernet' in path.stem
    lr, weight_decay = (6e-5, 0.01) if segments else (1e-4, 0.05)
    # A small detector that digits have trained, not an ImageNet backbone.
    lr = 1e-3 if path.stem == 'fcos_vim_bccd' else lr
    optimizer = dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    undecayed = ('A_log', 'A_b_log', 'cls_token', 'pos_embed')
    wanted = dict(
        type='OptimWrapper',
        optimizer=optimizer,
        clip_grad=dict(max_norm=5.0),
        paramwise_cfg=dict(
            flat_decay_mult=0.0, custom_keys={key: dict(decay_mult=0.0) for key in undecayed}
        ),
    )
    assert not differences(cfg.optim_wrapper.to_dict(), wanted)
    warm_up, rest = cfg.param_scheduler
    if segments:
        assert (warm_up.end, rest.type, rest.power, rest.eta_min) == (500, 'PolyLR', 1, 0)
        assert cfg.train_cfg.max_iters == 10_000
    else:
        assert (warm_up.end, rest.type, rest.eta_min_ratio) == (1, 'CosineAnnealingLR', 0.01)
        assert cfg.train_cfg.max_epochs == 50
    assert (warm_up.start_factor, rest.begin) == (0.01, warm_up.end)
    if path.stem == 'vim-tiny_images':
        assert not cfg.model.train_cfg  # Mixup and CutMix
