"""Models, registered in :data:`mmvim.registry.MODELS`."""

from mmvim.registry import MODELS, register_plain_names

from .backbones import MambaVision, VideoMamba, Vim
from .necks import SimpleFPN

register_plain_names()

__all__ = ['MODELS', 'MambaVision', 'SimpleFPN', 'VideoMamba', 'Vim']
