"""float32 boxes in mmdet under bfloat16 autocast.

Why: mmdet gives anchors and regions of interest the dtype of the features. bfloat16 has 8 bits of
precision: a coordinate between 512 and 1024 is rounded to a multiple of 4 pixels. Proposals and the
features pooled for them are then several pixels off. (Compiled mmcv ops do not support bfloat16, so
such a model does not run at all with them.)

How: anchors and points are created in float32 where bfloat16 is requested; the offsets that a head
predicts are added to them in float32 by type promotion. Regions are pooled from bfloat16 features
in float32, and autocast casts the result where it is used. float32 and float16 stay as they are.

Obsolete with: an mmdet that keeps boxes in float32 (onedl-mmdetection 3.5.1 does not).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ._import_hook import replaces, when_imported

_PRIORS = 'mmdet.models.task_modules.prior_generators'
_ROI_EXTRACTOR = 'mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor'


def install() -> None:
    """Act when mmdet's prior generators and RoI extractors are imported."""
    when_imported(f'{_PRIORS}.anchor_generator', _patch_anchors)
    when_imported(f'{_PRIORS}.point_generator', _patch_points)
    when_imported(_ROI_EXTRACTOR, _patch_roi_extractor)


def _patch_anchors(module: ModuleType) -> None:
    replaces(module.AnchorGenerator, 'grid_priors')(_float32_priors)


def _patch_points(module: ModuleType) -> None:
    replaces(module.MlvlPointGenerator, 'grid_priors')(_float32_priors)


def _float32_priors(
    original: Callable, self: Any, featmap_sizes: Any, dtype: Any = None, *args: Any, **kwargs: Any
) -> Any:
    import torch

    dtype = torch.float32 if dtype in (None, torch.bfloat16) else dtype
    return original(self, featmap_sizes, dtype, *args, **kwargs)


def _patch_roi_extractor(module: ModuleType) -> None:
    import torch

    @replaces(module.SingleRoIExtractor, 'forward')
    def forward(
        original: Callable, self: Any, feats: Any, rois: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if feats[0].dtype == torch.bfloat16:
            feats = tuple(feature.float() for feature in feats)
        return original(self, feats, rois, *args, **kwargs)
