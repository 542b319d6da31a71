"""Classifiers that mmpretrain does not have.

They derive from mmpretrain's, which detection and segmentation do not need.
"""

from ..utils.lazy import register_lazily

register_lazily('MesaClassifier', 'mmvim.models.classifiers.mesa')
register_lazily('SelfDistillClassifier', 'mmvim.models.classifiers.self_distill')
