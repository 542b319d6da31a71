"""VideoMamba on endless video: chunk by chunk, with a state of constant size."""

from .encoder import VideoMambaEncoder, build_videomamba
from .graph import GraphedStream
from .model import StreamingVideoMamba
from .state import VideoState

__all__ = [
    'GraphedStream',
    'StreamingVideoMamba',
    'VideoMambaEncoder',
    'VideoState',
    'build_videomamba',
]
