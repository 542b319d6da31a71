"""Classification of videos with mmpretrain."""

from ..utils.lazy import register_lazily
from .data_preprocessor import VideoDataPreprocessor

# Its base class is mmpretrain's, which detection and segmentation do not need.
register_lazily('VideoClassifier', 'mmvim.models.video.classifier')

__all__ = ['VideoDataPreprocessor']
