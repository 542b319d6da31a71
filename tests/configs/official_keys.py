"""Names and shapes in the authors' files, written down from their code and not from ours.

Sources: hustvl/Vim, vim/models_mamba.py; OpenGVLab/VideoMamba, videomamba/*/models/videomamba*.py
and video_mm/models/umt_videomamba.py; NVlabs/MambaVision, mambavision/models/mamba_vision.py and
object_detection/tools/mamba_vision.py; MzeroMiko/VMamba, classification/models/vmamba.py. The heads
of detectors and segmentors are those of mmdet 3.3 and mmsegmentation 1.2, by the configs from which
the authors' inherit.
"""

import functools
import importlib
import math
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, inputs: int, bias: bool = True) -> Shapes:
    return {f'{name}.weight': (out, inputs), **({f'{name}.bias': (out,)} if bias else {})}


def norm(name: str, channels: int) -> Shapes:
    return {f'{name}.weight': (channels,), f'{name}.bias': (channels,)}


def batch_norm(name: str, channels: int) -> Shapes:
    statistics = {f'{name}.running_mean': (channels,), f'{name}.running_var': (channels,)}
    return {**norm(name, channels), **statistics, f'{name}.num_batches_tracked': ()}


def conv(name: str, out: int, inputs: int, kernel: int, bias: bool = True) -> Shapes:
    weight = {f'{name}.weight': (out, inputs, kernel, kernel)}
    return {**weight, **({f'{name}.bias': (out,)} if bias else {})}


def bimamba(
    dim: int, depth: int, tokens: int, frames: int | None = None, last_norm: str = 'norm_f'
) -> Shapes:
    """Vim, or VideoMamba for images or clips, without a head."""
    inner, rank = 2 * dim, math.ceil(dim / 16)
    kernel = (3, 16, 16) if frames is None else (3, 1, 16, 16)
    shapes: Shapes = {
        'cls_token': (1, 1, dim),
        'pos_embed': (1, 1 + tokens, dim),
        'patch_embed.proj.weight': (dim, *kernel),
        'patch_embed.proj.bias': (dim,),
        f'{last_norm}.weight': (dim,),
    }
    if frames is not None:
        shapes['temporal_pos_embedding'] = (1, frames, dim)
    for i in range(depth):
        mixer = f'layers.{i}.mixer.'
        shapes |= {f'layers.{i}.norm.weight': (dim,)}
        shapes |= linear(f'{mixer}in_proj', 2 * inner, dim, bias=False)
        shapes |= linear(f'{mixer}out_proj', dim, inner, bias=False)
        for b in ('', '_b'):
            shapes |= {f'{mixer}A{b}_log': (inner, 16), f'{mixer}D{b}': (inner,)}
            shapes |= {
                f'{mixer}conv1d{b}.weight': (inner, 1, 4),
                f'{mixer}conv1d{b}.bias': (inner,),
            }
            shapes |= linear(f'{mixer}x_proj{b}', rank + 32, inner, bias=False)
            shapes |= linear(f'{mixer}dt_proj{b}', inner, rank)
    return shapes


def multimodal(dim: int, depth: int) -> Shapes:
    """VideoMamba's vision encoder of 8 frames, and some of each other part of the model."""
    encoder = {
        **bimamba(dim, depth, 196, 8, last_norm='norm'),
        **norm('pool_norm', dim),
        **masked_decoder(dim),
    }
    return {
        **{f'vision_encoder.{name}': shape for name, shape in encoder.items()},
        **linear('vision_proj', 512, dim),
        **linear('text_proj', 512, 768),
        **linear('itm_head', 2, 768),
        'temp': (),
        'text_encoder.bert.embeddings.word_embeddings.weight': (30522, 768),
        'clip_teacher.class_embedding': (768,),
    }


def masked_decoder(dim: int) -> Shapes:
    return {**linear('clip_decoder.0.head', 512, dim), **norm('clip_decoder.0.norm', 512)}


MAMBAVISION = {
    # depths, channels, channels of the stem, layer scale
    'T': ((1, 3, 8, 4), 80, 32, False),
    'T2': ((1, 3, 11, 4), 80, 32, False),
    'S': ((3, 3, 7, 5), 96, 64, False),
    'B': ((3, 3, 10, 5), 128, 64, True),
    'L': ((3, 3, 10, 5), 196, 64, True),
    'L2': ((3, 3, 12, 5), 196, 64, True),
    'L3': ((3, 3, 20, 10), 256, 64, True),
}


def mambavision(name: str, dense: bool = False) -> Shapes:
    """MambaVision with its norm and head, or with a norm for each stage."""
    depths, width, stem, scaled = MAMBAVISION[name]
    shapes = conv('patch_embed.conv_down.0', stem, 3, 3, bias=False)
    shapes |= batch_norm('patch_embed.conv_down.1', stem)
    shapes |= conv('patch_embed.conv_down.3', width, stem, 3, bias=False)
    shapes |= batch_norm('patch_embed.conv_down.4', width)
    for stage, depth in enumerate(depths):
        dim = width * 2**stage
        half, rank = dim // 2, math.ceil(dim / 16)
        for j in range(depth):
            block = f'levels.{stage}.blocks.{j}.'
            if stage < 2:
                for k in (1, 2):
                    shapes |= conv(f'{block}conv{k}', dim, dim, 3)
                    shapes |= batch_norm(f'{block}norm{k}', dim)
                continue
            shapes |= {**norm(f'{block}norm1', dim), **norm(f'{block}norm2', dim)}
            shapes |= linear(f'{block}mlp.fc1', 4 * dim, dim)
            shapes |= linear(f'{block}mlp.fc2', dim, 4 * dim)
            if scaled:
                shapes |= {f'{block}gamma_{k}': (dim,) for k in (1, 2)}
            mixer = f'{block}mixer.'
            if j >= depth - depth // 2:
                shapes |= linear(f'{mixer}qkv', 3 * dim, dim)
                shapes |= linear(f'{mixer}proj', dim, dim)
                continue
            shapes |= {f'{mixer}A_log': (half, 8), f'{mixer}D': (half,)}
            shapes |= {f'{mixer}conv1d_{k}.weight': (half, 1, 3) for k in 'xz'}
            shapes |= linear(f'{mixer}in_proj', dim, dim, bias=False)
            shapes |= linear(f'{mixer}x_proj', rank + 16, half, bias=False)
            shapes |= linear(f'{mixer}dt_proj', half, rank)
            shapes |= linear(f'{mixer}out_proj', dim, dim, bias=False)
        if stage < 3:
            name = f'levels.{stage}.downsample.reduction.0'
            shapes |= conv(name, 2 * dim, dim, 3, bias=False)
    if dense:
        for stage in range(4):
            shapes |= norm(f'outnorm{stage}', width * 2**stage)
        return shapes
    return {**shapes, **batch_norm('norm', 8 * width), **linear('head', 1000, 8 * width)}


VMAMBA = {
    # depths, channels, expansion of the scan; the models of the first release have None
    'T[s1l8]': ((2, 2, 8, 2), 96, 1),
    'S[s1l20]': ((2, 2, 20, 2), 96, 1),
    'B[s1l20]': ((2, 2, 20, 2), 128, 1),
    'T[s2l5]': ((2, 2, 5, 2), 96, 2),
    'S[s2l15]': ((2, 2, 15, 2), 96, 2),
    'B[s2l15]': ((2, 2, 15, 2), 128, 2),
    'Vanilla-T': ((2, 2, 9, 2), 96, None),
    'Vanilla-S': ((2, 2, 27, 2), 96, None),
    'Vanilla-B': ((2, 2, 27, 2), 128, None),
}


def vmamba(name: str, dense: bool = False, first_release: bool = False) -> Shapes:
    """VMamba with its classifier, or with a norm for each stage.

    ``first_release`` gives the models of the first release the names of that release's code.
    """
    depths, width, ratio = VMAMBA[name]
    vanilla = ratio is None
    states, ratio = (16, 2) if vanilla else (1, ratio)
    if vanilla:
        shapes = {**conv('patch_embed.0', width, 3, 4), **norm('patch_embed.2', width)}
    else:
        shapes = {**conv('patch_embed.0', width // 2, 3, 3), **norm('patch_embed.2', width // 2)}
        shapes |= {**conv('patch_embed.5', width, width // 2, 3), **norm('patch_embed.7', width)}
    for stage, depth in enumerate(depths):
        dim = width * 2**stage
        inner, rank = ratio * dim, math.ceil(dim / 16)
        for j in range(depth):
            block = f'layers.{stage}.blocks.{j}.'
            op = f'{block}op.'
            shapes |= {
                **norm(f'{block}norm', dim),
                f'{op}x_proj_weight': (4, rank + 2 * states, inner),
                f'{op}dt_projs_weight': (4, inner, rank),
                f'{op}dt_projs_bias': (4, inner),
                f'{op}A_logs': (4 * inner, states),
                f'{op}Ds': (4 * inner,),
                **norm(f'{op}out_norm', inner),
                **linear(f'{op}in_proj', 2 * inner if vanilla else inner, dim, bias=False),
                **linear(f'{op}out_proj', dim, inner, bias=False),
                **conv(f'{op}conv2d', inner, 1, 3, bias=vanilla),
            }
            if not vanilla:
                shapes |= norm(f'{block}norm2', dim)
                shapes |= linear(f'{block}mlp.fc1', 4 * dim, dim)
                shapes |= linear(f'{block}mlp.fc2', dim, 4 * dim)
        down = f'layers.{stage}.downsample.'
        if stage < 3 and vanilla:
            shapes |= norm(f'{down}norm', 4 * dim)
            shapes |= linear(f'{down}reduction', 2 * dim, 4 * dim, bias=False)
        elif stage < 3:
            shapes |= {**conv(f'{down}1', 2 * dim, dim, 3), **norm(f'{down}3', 2 * dim)}
    if dense:
        for stage in range(4):
            shapes |= norm(f'outnorm{stage}', width * 2**stage)
    else:
        shapes |= norm('classifier.norm', 8 * width)
        shapes |= linear('classifier.head', 1000, 8 * width)
    if not first_release:
        return shapes
    old = {'patch_embed.0.': 'patch_embed.proj.', 'patch_embed.2.': 'patch_embed.norm.'}
    old |= {'.op.': '.self_attention.', 'classifier.': ''}
    renamed = {}
    for key, shape in shapes.items():
        key = key.replace('.norm.', '.ln_1.') if '.blocks.' in key else key
        for new, name in old.items():
            key = key.replace(new, name)
        renamed[key] = shape
    return renamed


HEADS = {
    'mask-rcnn': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'cascade-mask-rcnn': (
        'mmdet::convnext/'
        'cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
    ),
    'upernet': 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
}


@functools.cache
def heads(kind: str, width: int) -> Shapes:
    """Everything of a detector or segmentor but the backbone, whose first map has ``width``."""
    library, _, file = HEADS[kind].partition('::')
    folder = Path(importlib.import_module(library).__file__).parent
    model = Config.fromfile(folder / '.mim/configs' / file).model
    # Any backbone that can be built without memory.
    model.backbone = dict(type='ResNet', depth=18)
    channels = [width * 2**i for i in range(4)]
    if kind == 'upernet':
        model.decode_head.in_channels, model.auxiliary_head.in_channels = channels, channels[2]
    else:
        model.neck.in_channels = channels
    init_default_scope(library)
    importlib.import_module(f'{library}.models')
    with torch.device('meta'):
        shapes = {k: tuple(v.shape) for k, v in MODELS.build(model).state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not name.startswith('backbone.')}


def whole(backbone: Shapes, kind: str, width: int) -> Shapes:
    """A detector or segmentor."""
    return {**{f'backbone.{k}': v for k, v in backbone.items()}, **heads(kind, width)}
