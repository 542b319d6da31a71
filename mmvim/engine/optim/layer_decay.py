"""Layer-wise learning-rate decay for backbones that know the depth of their parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mmvim.errors import did_you_mean
from mmvim.registry import OPTIM_WRAPPER_CONSTRUCTORS

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KEYS = (
    'layer_decay_rate',
    'custom_keys',
    'norm_decay_mult',
    'bias_decay_mult',
    'flat_decay_mult',
)
_CUSTOM_KEYS = ('lr_mult', 'decay_mult')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Lower learning rates for the earlier layers of the backbone.

    A parameter of layer ``i`` of a backbone with ``n`` layers learns with
    ``lr * layer_decay_rate ** (n - 1 - i)``; ``backbone.get_layer_depth(name, prefix)`` gives i, n:
    the embedding is layer 0, the blocks are 1 to n - 2, everything after them is n - 1. Everything
    outside the backbone (necks, heads) learns with ``lr``. This is the rule of BEiT (Bao et al.,
    2021) and of mmpretrain's constructor.

    It works for classifiers, detectors and segmentors of all three task libraries, wrapped for
    distributed training or not, and for a backbone alone. Parameters with the same learning rate
    and weight decay share a group, so that fused and foreach optimizers stay fast.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its ``optimizer`` needs ``lr``.
        paramwise_cfg: ``layer_decay_rate`` (float in (0, 1], needed) and, each of them optional,

            - ``custom_keys``: ``{part of a name: dict(lr_mult=…, decay_mult=…)}``; the longest
              matching part wins (of equally long ones the first in the alphabet), and alone decides
              the weight decay. ``lr_mult`` multiplies the layer's learning rate.
            - ``norm_decay_mult``: factor on the weight decay of norm layers, RMSNorm included.
            - ``bias_decay_mult``: factor on that of biases outside norm layers.
            - ``flat_decay_mult``: factor on that of all other parameters with one dimension.

    Raises:
        ValueError: A key or value of ``paramwise_cfg`` is unknown, or ``lr`` or ``weight_decay`` is
            missing where it is needed.
        TypeError: The model has no backbone with ``get_layer_depth``.

    Example:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='mmvim.LayerDecayOptimizerConstructor',
        ...     paramwise_cfg=dict(
        ...         layer_decay_rate=0.837,
        ...         norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0,
        ...         custom_keys={'A_log': dict(decay_mult=0.0)}))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        config = self.paramwise_cfg
        for key in config:
            if key not in _KEYS:
                raise ValueError(
                    f'optim_wrapper.paramwise_cfg has an unknown key {key!r}'
                    f'{did_you_mean(key, _KEYS)}; allowed: {", ".join(_KEYS)}'
                )
        rate = config.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(
                'optim_wrapper.paramwise_cfg.layer_decay_rate must be a number in (0, 1], '
                f'not {rate!r}'
            )
        if self.base_lr is None:
            raise ValueError('optim_wrapper.optimizer.lr must be given for layer-wise decay of it')
        for key, value in config.get('custom_keys', {}).items():
            unknown = set(value) - set(_CUSTOM_KEYS)
            if unknown:
                raise ValueError(
                    f'optim_wrapper.paramwise_cfg.custom_keys[{key!r}] has unknown keys '
                    f'{sorted(unknown)}; allowed: {", ".join(_CUSTOM_KEYS)}'
                )
        if 'flat_decay_mult' in config and self.base_wd is None:
            raise ValueError('flat_decay_mult needs optim_wrapper.optimizer.weight_decay')

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Sort the parameters of ``module`` into groups and append these to ``params``."""
        depth_of = self._depth_function(module)
        groups: dict[tuple, dict] = {}
        seen: set[int] = set()
        for prefix, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                full_name = f'{prefix}.{name}' if prefix else name
                layer, scale = depth_of(full_name)
                lr_mult, decay_mult = self._multipliers(full_name, owner, parameter)
                key = (layer, scale * lr_mult, decay_mult)
                group = groups.setdefault(key, {'params': []})
                group['params'].append(parameter)
        if not groups:
            raise ValueError('the model has no parameter that requires a gradient')
        for (layer, scale, decay_mult), group in sorted(groups.items()):
            group.update(lr=self.base_lr * scale, lr_scale=scale, layer_id=layer)
            if self.base_wd is not None:
                group['weight_decay'] = self.base_wd * decay_mult
            params.append(group)
        print_log(_table(params), logger='current')

    def _depth_function(self, model: nn.Module) -> Callable[[str], tuple[int, float]]:
        """Return a function from a parameter's name to its layer and learning-rate factor."""
        backbone, prefix = getattr(model, 'backbone', None), 'backbone.'
        if backbone is None and hasattr(model, 'get_layer_depth'):
            backbone, prefix = model, ''
        if not callable(getattr(backbone, 'get_layer_depth', None)):
            owner = f'its backbone {type(backbone).__name__}' if backbone is not None else 'it'
            raise TypeError(
                'layer-wise learning-rate decay needs a backbone with get_layer_depth(name, '
                f'prefix): the model is a {type(model).__name__}, and {owner} has none'
            )
        get_depth = partial(backbone.get_layer_depth, prefix=prefix)
        rate = self.paramwise_cfg['layer_decay_rate']
        some_name = next(name for name, _ in backbone.named_parameters())
        last = get_depth(prefix + some_name)[1] - 1

        def depth(name: str) -> tuple[int, float]:
            if not name.startswith(prefix):
                return last, 1.0
            layer, layers = get_depth(name)
            return layer, rate ** (layers - 1 - layer)

        return depth

    def _multipliers(self, name: str, owner: nn.Module, parameter: nn.Parameter) -> tuple:
        """Return the factors on learning rate and weight decay, apart from the layer's."""
        config = self.paramwise_cfg
        custom = config.get('custom_keys', {})
        matching = [key for key in custom if key in name]
        if matching:
            chosen = custom[min(matching, key=lambda key: (-len(key), key))]
            return chosen.get('lr_mult', 1.0), chosen.get('decay_mult', 1.0)
        is_norm = isinstance(owner, _NORMS) or type(owner).__name__.rstrip('123d').endswith('Norm')
        if is_norm and 'norm_decay_mult' in config:
            return 1.0, config['norm_decay_mult']
        if not is_norm and name.rpartition('.')[2] == 'bias' and 'bias_decay_mult' in config:
            return 1.0, config['bias_decay_mult']
        if parameter.ndim == 1 and 'flat_decay_mult' in config:
            return 1.0, config['flat_decay_mult']
        return 1.0, 1.0


def _table(groups: list[dict]) -> str:
    lines = ['Layer-wise learning-rate decay:', 'layer  lr         weight decay  parameters']
    lines += [
        f'{group["layer_id"]:>5}  {group["lr"]:<9.3g}  {group.get("weight_decay", "-"):<12}  '
        f'{len(group["params"])} tensors, {sum(p.numel() for p in group["params"]):,} values'
        for group in groups
    ]
    return '\n'.join(lines)
