"""The interface of VideoMamba's multimodal encoder, over :class:`StreamingVideoMamba`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvim._checks import check_choice
from mmvim.checkpoints.keys import keys_under, rename_keys, strip_prefixes, unwrap_state_dict
from mmvim.layers import MambaState
from mmvim.models.backbones.videomamba import VISION_ENCODER, is_companion

from .model import StreamingVideoMamba

_POOLS = ('cls', 'avg', 'cls+avg', 'cls_cat_avg')
_REQUIRED = ('img_size', 'patch_size', 'depth', 'embed_dim', 'channels', 'num_frames')
_OPTIONAL: dict[str, Any] = {
    'drop_path_rate': 0.0,
    'ssm_cfg': None,
    'norm_epsilon': 1e-5,
    'rms_norm': True,
    'residual_in_fp32': True,
    'bimamba': True,
    'pool_type': 'cls+avg',
    'kernel_size': 1,
    'use_checkpoint': False,
    'max_frames': None,
    'pretrained': None,
    'ckpt_num_frame': None,
}
# Read by the official code but meaningless here: the backend chooses the kernels, and
# use_checkpoint recomputes all layers.
_IGNORED = ('fused_add_norm', 'checkpoint_num', 'name', 'd_model')


class VideoMambaEncoder(nn.Module):
    """VideoMamba without a head, for chunks and a list of states.

    :func:`build_videomamba` makes it from a config.

    Args:
        add_pool_norm (bool): Whether ``forward`` also returns pooled, normed features.
            Defaults to True.
        pool_type (str): 'cls', 'avg', 'cls+avg' (their sum) or 'cls_cat_avg' (one after the other).
            Defaults to 'cls+avg'.
        **kwargs: Arguments of :class:`mmvim.StreamingVideoMamba`, except ``stream_mode``.
    """

    def __init__(
        self, add_pool_norm: bool = True, pool_type: str = 'cls+avg', **kwargs: Any
    ) -> None:
        super().__init__()
        check_choice('pool_type', pool_type, _POOLS)
        bidirectional = kwargs.pop('bimamba', 'v2') == 'v2'
        # With unlimited look-ahead it is the bidirectional model, which has no states.
        mode = {'stream_mode': 'lookahead', 'lookahead_frames': 0} if bidirectional else {}
        self.backbone = StreamingVideoMamba(**mode, **kwargs)
        self.bidirectional = bidirectional
        self.add_pool_norm = add_pool_norm
        self.pool_type = pool_type
        if add_pool_norm:
            self.pool_norm = nn.LayerNorm(self.backbone.embed_dims)

    @property
    def patch_embed(self) -> nn.Module:
        """The patch embedding; its ``tubelet_size`` turns frames into temporal tokens."""
        return self.backbone.patch_embed

    def init_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[MambaState]:
        """Return the states before the first frame, one for each layer.

        Returns:
            list: (conv (batch, d_inner, d_conv - 1), ssm (batch, d_inner, d_state)); ssm is
            float32 for any ``dtype`` (float64 for float64).
        """
        self._require_states()
        return list(self.backbone.init_state(batch_size, device, dtype).layers)

    def _require_states(self) -> None:
        if self.bidirectional:
            raise ValueError(
                'a bidirectional VideoMamba (bimamba=True) has no states: its backward direction '
                'needs the future. Use bimamba=False, or mmvim.StreamingVideoMamba with '
                "stream_mode='block' or 'lookahead'"
            )

    def forward_features(
        self,
        x: Tensor,
        mask: None = None,
        use_image: bool = False,
        ssm_state: Sequence[MambaState] | None = None,
        temporal_pos_offset: int = 0,
    ) -> Tensor | tuple[Tensor, list[MambaState]]:
        """Compute the tokens.

        Args:
            x (Tensor): (batch, channels, frames, height, width).
            mask (None): Masked pretraining is not supported.
            use_image (bool): Whether ``x`` is an image (one tubelet), which gets no temporal
                position. Defaults to False.
            ssm_state (list, optional): States of the layers, from :meth:`init_state` or the
                previous chunk; not modified.
            temporal_pos_offset (int): Temporal tokens (frames / tubelet) before this chunk. The
                class token is in the first chunk only, at offset 0. Defaults to 0.

        Returns:
            Tensor or tuple: (batch, tokens, channels), normed, with the class token, if any,
            first; with ``ssm_state`` also the new states.

        Raises:
            ValueError: If the states do not fit, or the model is bidirectional and has none.
        """
        if mask is not None:
            raise ValueError('mask must be None: masked pretraining is not offered')
        if not isinstance(temporal_pos_offset, int) or temporal_pos_offset < 0:
            raise ValueError(f'temporal_pos_offset={temporal_pos_offset!r} must be 0 or more')
        if ssm_state is None and temporal_pos_offset:
            raise ValueError('temporal_pos_offset needs ssm_state: a whole video begins at 0')
        model = self.backbone
        if use_image and x.shape[2] != model.tubelet_size:
            raise ValueError(f'use_image=True with {x.shape[2]} frames')
        if ssm_state is not None:
            self._check_states(ssm_state, x)
        hidden, _ = model._embed_part(x, temporal_pos_offset, positions_in_time=not use_image)
        if ssm_state is None:
            recompute = model.with_cp and self.training
            return model._run(hidden, lambda i, h: model.layers[i].mixer(h), recompute)
        states: list[MambaState] = []

        def mix(i: int, h: Tensor) -> Tensor:
            h, state = model.layers[i].mixer(h, MambaState(*ssm_state[i]), return_state=True)
            states.append(state)
            return h

        return model._run(hidden, mix), states

    def _check_states(self, states: Sequence, x: Tensor) -> None:
        self._require_states()
        if not isinstance(states, Sequence) or len(states) != self.backbone.num_layers:
            raise ValueError(
                f'ssm_state must be a list of {self.backbone.num_layers} states, one for each layer'
            )
        conv = states[0][0]
        if conv.shape[0] != x.shape[0] or conv.dtype != x.dtype:
            raise ValueError(
                f'the chunk is {x.shape[0]} streams of {x.dtype} and ssm_state {conv.shape[0]} of '
                f'{conv.dtype}'
            )

    def forward(
        self,
        x: Tensor,
        mask: None = None,
        use_image: bool = False,
        keep_temporal: bool = False,
        ssm_state: Sequence[MambaState] | None = None,
        temporal_pos_offset: int = 0,
    ) -> Any:
        """Compute and pool the tokens; arguments as in :meth:`forward_features`.

        Args:
            keep_temporal (bool): Whether each time step is pooled separately. Defaults to False.

        Returns:
            ``(x_vis, x_pool)``, with states ``(x_vis, x_pool, next_state)``; with
            ``add_pool_norm=False`` ``x_vis``, with states ``(x_vis, next_state)``. x_vis: (batch,
            tokens, channels) without the class token where features are pooled, with it where they
            are not. x_pool: (batch, 1, channels), or (batch, steps, channels) with
            ``keep_temporal``; 'cls_cat_avg' has the class token's features before them.

        Raises:
            ValueError: If the class token is to be pooled while streaming: there it is the first
                token and sees nothing of the video.
        """
        features = self.forward_features(x, mask, use_image, ssm_state, temporal_pos_offset)
        features, states = features if ssm_state is not None else (features, None)
        if not self.add_pool_norm:
            return features if states is None else (features, states)
        if not self.bidirectional and self.pool_type != 'avg':
            raise ValueError(
                f'pool_type={self.pool_type!r} in one direction: the class token at the head sees '
                "nothing of the video; use pool_type='avg'"
            )
        extra = self.backbone.num_extra_tokens if temporal_pos_offset == 0 else 0
        token, vis = features[:, :extra], features[:, extra:]
        steps = x.shape[2] // self.backbone.tubelet_size if keep_temporal else 1
        pooled = vis.unflatten(1, (steps, -1)).mean(2)
        if self.pool_type == 'cls':
            pooled = token
        elif self.pool_type == 'cls+avg':
            pooled = token + pooled
        elif self.pool_type == 'cls_cat_avg':
            pooled = torch.cat((token, pooled), dim=1)
        pooled = self.pool_norm(pooled)
        return (vis, pooled) if states is None else (vis, pooled, states)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: tokens and positions."""
        names = ('cls_token', 'pos_embed', 'temporal_pos_embedding')
        return {f'backbone.{name}' for name in names if hasattr(self.backbone, name)}

    def _load_from_state_dict(self, state_dict: MutableMapping, prefix: str, *args: Any) -> None:
        """Rename the keys of the official encoder to those used here."""
        if not prefix:
            unwrap_state_dict(state_dict)
            strip_prefixes(state_dict, ('encoder.', VISION_ENCODER))
        keys = keys_under(state_dict, prefix)
        if not any(key.startswith('backbone.') for key in keys):
            for key in keys:
                unwanted = key.startswith('pool_norm.') and not self.add_pool_norm
                if unwanted or is_companion(key):
                    del state_dict[prefix + key]
            names = {}
            for key in keys_under(state_dict, prefix):
                if key.startswith('pool_norm.'):
                    continue
                # The official encoder calls its last norm `norm`.
                own = 'norm_f.' + key[5:] if key.startswith('norm.') else key
                names[prefix + key] = f'{prefix}backbone.{own}'
            rename_keys(state_dict, names)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _get(config: Any, name: str) -> Any:
    return config[name] if isinstance(config, Mapping) else getattr(config, name)


def _has(config: Any, name: str) -> bool:
    return name in config if isinstance(config, Mapping) else hasattr(config, name)


def build_videomamba(config: Any, add_pool_norm: bool = True) -> VideoMambaEncoder:
    """Build VideoMamba's encoder from a config, on any device.

    Args:
        config: Object or mapping with ``vision_encoder``, an object or mapping with img_size,
            patch_size, depth, embed_dim, channels and num_frames and, optionally, drop_path_rate
            (0), norm_epsilon (1e-5), rms_norm (True), residual_in_fp32 (True), bimamba (True),
            pool_type ('cls+avg'), kernel_size (frames of a tubelet, 1), use_checkpoint (False),
            ssm_cfg (d_state, d_conv, expand, dt_rank), max_frames (num_frames), pretrained (a
            file) and ckpt_num_frame (frames that file was trained with; needed with pretrained).
        add_pool_norm (bool): Whether ``forward`` also returns pooled features. Defaults to True.

    Returns:
        VideoMambaEncoder: ``forward(x) -> (x_vis, x_pool)`` and ``forward(x, ssm_state=state,
        temporal_pos_offset=steps) -> (x_vis, x_pool, next_state)``.

    Raises:
        ValueError: If the config lacks a key or has an unknown one, or the file does not fit.
    """
    given = _get(config, 'vision_encoder')
    missing = [name for name in _REQUIRED if not _has(given, name)]
    if missing:
        raise ValueError(f'config.vision_encoder lacks {", ".join(missing)}')
    names = set(given) if isinstance(given, Mapping) else set(vars(given))
    unknown = names - {*_REQUIRED, *_OPTIONAL, *_IGNORED}
    if unknown:
        raise ValueError(
            f'config.vision_encoder has unknown keys {sorted(unknown)}; allowed: '
            f'{sorted({*_REQUIRED, *_OPTIONAL, *_IGNORED})}'
        )
    options = {
        **{name: _get(given, name) for name in _REQUIRED},
        **{k: _get(given, k) if _has(given, k) else v for k, v in _OPTIONAL.items()},
    }
    ssm_cfg = dict(options['ssm_cfg'] or {})
    ssm_cfg.pop('use_fast_path', None)  # kernels are chosen by the backend
    model = VideoMambaEncoder(
        add_pool_norm=add_pool_norm,
        pool_type=options['pool_type'],
        arch={'embed_dims': options['embed_dim'], 'depth': options['depth'], **ssm_cfg},
        img_size=options['img_size'],
        patch_size=options['patch_size'],
        in_channels=options['channels'],
        num_frames=options['num_frames'],
        tubelet_size=options['kernel_size'],
        max_frames=options['max_frames'],
        bimamba='v2' if options['bimamba'] else 'none',
        norm='RMSNorm' if options['rms_norm'] else 'LayerNorm',
        norm_eps=options['norm_epsilon'],
        residual_in_fp32=options['residual_in_fp32'],
        drop_path_rate=options['drop_path_rate'],
        with_cp=options['use_checkpoint'],
    )
    if options['pretrained']:
        _load(model, options['pretrained'], options['ckpt_num_frame'])
    return model


def _load(model: VideoMambaEncoder, path: str, frames: int | None) -> None:
    if frames is None:
        raise ValueError('pretrained needs ckpt_num_frame, the frames it was trained with')
    from mmengine.runner.checkpoint import CheckpointLoader

    weights = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    unwrap_state_dict(weights)
    table = next((v for k, v in weights.items() if k.endswith('temporal_pos_embedding')), None)
    steps = frames // model.backbone.tubelet_size
    if table is not None and table.shape[1] != steps:
        raise ValueError(
            f'ckpt_num_frame={frames} means {steps} temporal positions, and {path!r} has '
            f'{table.shape[1]}'
        )
    model.load_state_dict(weights)
