"""Layers built from :mod:`mmvim.ops`, for any PyTorch program; they need only torch."""

from .bimamba import BiMamba
from .conv import CausalConv1d
from .drop import DropPath
from .mamba import Mamba, MambaState
from .mambavision import Attention, MambaVisionMixer, window_partition, window_reverse
from .mlp import Mlp
from .norm import LayerNorm, LayerNorm2d, RMSNorm, build_norm
from .patch_embed import PatchEmbed
from .position import (
    CLS_TOKEN_PLACES,
    apply_rotary,
    insert_tokens,
    resize_pos_embed,
    rotary_table_2d,
    split_tokens,
    token_positions,
)
from .ss2d import SS2D
from .stack import MambaBlock, MambaStack, drop_path_rates
from .tubelet_embed import TubeletEmbed, resize_temporal_pos_embed

__all__ = [
    'CLS_TOKEN_PLACES',
    'SS2D',
    'Attention',
    'BiMamba',
    'CausalConv1d',
    'DropPath',
    'LayerNorm',
    'LayerNorm2d',
    'Mamba',
    'MambaBlock',
    'MambaStack',
    'MambaState',
    'MambaVisionMixer',
    'Mlp',
    'PatchEmbed',
    'RMSNorm',
    'TubeletEmbed',
    'apply_rotary',
    'build_norm',
    'drop_path_rates',
    'insert_tokens',
    'resize_pos_embed',
    'resize_temporal_pos_embed',
    'rotary_table_2d',
    'split_tokens',
    'token_positions',
    'window_partition',
    'window_reverse',
]
