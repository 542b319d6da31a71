"""Every recipe is what the tables of published numbers say, setting by setting."""

import pytest
from config_harness import FAMILIES, config_id
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
