"""Every config trains and tests on data in the layout of the real one."""

import shutil

import pytest
from config_harness import CONFIGS, config_id, kinds, run, shrink
from mmengine.config import Config

SAVE_BEST = {'mmpretrain': 'accuracy_top1', 'mmdet': 'coco_bbox_mAP', 'mmseg': 'mIoU'}


def check(path, data, work_dir, shallow):
    cfg = shrink(Config.fromfile(path), data, work_dir, shallow=shallow)
    metrics = run(cfg)
    best = cfg.default_hooks.checkpoint.save_best
    assert best in metrics or best.split('/')[-1] in metrics, (best, sorted(metrics))
    assert list(work_dir.glob(f'best_{SAVE_BEST[cfg.default_scope]}*.pth'))
    shutil.rmtree(work_dir)


@pytest.mark.parametrize('path', kinds(CONFIGS))
def test_step_shallow(path, miniature_data, tmp_path):
    check(path, miniature_data, tmp_path, shallow=True)


@pytest.mark.slow
@pytest.mark.parametrize('path', CONFIGS, ids=config_id)
def test_step_full_depth(path, miniature_data, tmp_path):
    check(path, miniature_data, tmp_path, shallow=False)
