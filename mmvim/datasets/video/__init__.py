"""Videos: files, clips, and augmentations that treat all frames of a clip in the same way."""

from .dataset import VideoDataset
from .errors import VideoSampleError
from .frames import FrameFolder, open_video
from .reader import VideoReader
from .sampling import at_regular_times, dense_indices, uniform_indices
from .transforms import (
    LoadVideo,
    PackVideo,
    RandomErasingVideo,
    RepeatAugment,
    ThreeCrop,
    VideoTransform,
)

__all__ = [
    'FrameFolder',
    'LoadVideo',
    'PackVideo',
    'RandomErasingVideo',
    'RepeatAugment',
    'ThreeCrop',
    'VideoDataset',
    'VideoReader',
    'VideoSampleError',
    'VideoTransform',
    'at_regular_times',
    'dense_indices',
    'open_video',
    'uniform_indices',
]
