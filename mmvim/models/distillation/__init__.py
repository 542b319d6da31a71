"""Learning from the features of another model."""

from ..utils.lazy import register_lazily

# Its base class is mmpretrain's, which detection and segmentation do not need.
register_lazily('SelfDistillClassifier', 'mmvim.models.distillation.classifier')
