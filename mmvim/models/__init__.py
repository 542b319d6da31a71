"""Models, registered in :data:`mmvim.registry.MODELS`."""

from mmvim.registry import MODELS, register_plain_names

from . import classifiers  # noqa: F401
from .backbones import MambaVision, VideoMamba, Vim
from .necks import SimpleFPN
from .streaming import GraphedStream, StreamingVideoMamba, build_videomamba
from .video import VideoDataPreprocessor

register_plain_names()

__all__ = [
    'MODELS',
    'GraphedStream',
    'MambaVision',
    'SimpleFPN',
    'StreamingVideoMamba',
    'VideoDataPreprocessor',
    'VideoMamba',
    'Vim',
    'build_videomamba',
]
