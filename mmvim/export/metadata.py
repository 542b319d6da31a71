"""Metadata of an exported file on its inputs and outputs."""

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

from mmengine.config import Config
from mmengine.registry import TRANSFORMS, DefaultScope
from torch import nn

from mmvim._configs import type_name
from mmvim.apis.inferencers.pipeline import transforms_of
from mmvim.apis.inputs import input_channels


def describe(cfg: Config, model: nn.Module) -> dict[str, Any]:
    """Metadata for the user of a file: the processing of a picture before and after the model.

    Args:
        cfg: The model's config.
        model: The model; its ``dataset_meta`` names the classes.

    Returns:
        Plain data, ready for JSON:

        - 'pipeline': the steps of the test pipeline from reading to packing, each with all its
          arguments, defaults included.
        - 'channels': order of the input's channels, 'RGB', 'BGR', 'BGRA', 'grey' or 'as stored'.
        - 'mean', 'std': values of each channel, in that order; the input is (pixel - mean) / std.
        - 'pad': 'divisor' of the sides, or the 'size', and 'value', of the padding on the right and
          below after normalisation.
        - 'output': 'logits', 'feature maps' (of a detector's neck) or 'features'.
        - 'activation': 'softmax', 'sigmoid' or 'none', which turns logits into predictions. Those
          of several clips or crops are averaged afterwards.
        - 'align_corners', 'sliding_window', 'threshold': for a segmentor, the resizing of its
          logits to the picture, the 'crop_size' and 'stride' if it does not see whole pictures,
          and the least score of the foreground if that is its only class.
        - 'classes': their names.
    """
    described: dict[str, Any] = {}
    if transforms_of(cfg):
        described['pipeline'] = _steps(cfg)
    preprocessor = getattr(model, 'data_preprocessor', None)
    described['channels'] = _channel_order(described.get('pipeline', []), model)
    for key in ('mean', 'std'):
        values = getattr(preprocessor, key, None)
        if values is not None:
            # The buffers are float32, of which seven digits are exact.
            described[key] = [float(f'{value:.7g}') for value in values.flatten().tolist()]
    padding = _padding(preprocessor)
    if padding:
        described['pad'] = padding
    described.update(_outputs(cfg, model))
    classes = getattr(model, 'dataset_meta', {}).get('classes')
    if classes:
        described['classes'] = [str(name) for name in classes]
    return described


def _steps(cfg: Config) -> list[dict[str, Any]]:
    """The test pipeline without annotations and packing."""
    scope = cfg.get('default_scope')
    with (
        DefaultScope.overwrite_default_scope(scope),
        TRANSFORMS.switch_scope_and_registry(scope) as registry,
    ):
        return [
            _complete(transform, registry)
            for transform in transforms_of(cfg)
            if not (name := type_name(transform)).startswith('Pack')
            and not (name.startswith('Load') and 'Annotation' in name)
        ]


def _complete(transform: Any, registry: Any) -> Any:
    """A transform's config with the defaults of its class, as plain data."""
    if not isinstance(transform, Mapping) or 'type' not in transform:
        return _plain(transform)
    kind = transform['type']
    kind = registry.get(kind) if isinstance(kind, str) else kind
    steps = {'type': type_name(transform)}
    classes = list(kind.__mro__) if isinstance(kind, type) else []
    if steps['type'] == 'VideoTransform':
        from torchvision.transforms import v2

        classes += getattr(v2, transform['name']).__mro__
    for cls in reversed(classes):
        if '__init__' in vars(cls):
            steps.update(
                (name, _plain(parameter.default))
                for name, parameter in inspect.signature(cls.__init__).parameters.items()
                if parameter.default is not parameter.empty
            )
    for key, value in transform.items():
        if key == 'type':
            continue
        nested = isinstance(value, (list, tuple)) and any(isinstance(x, Mapping) for x in value)
        steps[key] = [_complete(x, registry) for x in value] if nested else _plain(value)
    return steps


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    value = value.value if isinstance(value, Enum) else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _channel_order(steps: list[dict], model: nn.Module) -> str:
    channels = input_channels(model)
    reader = steps[0] if steps else {}
    stored = reader.get('imdecode_backend') == 'tifffile'
    if channels == 4 and reader['type'] == 'LoadImageFromFile' and not stored:
        return 'BGRA'
    if channels != 3:
        return 'grey' if channels == 1 else 'as stored'
    preprocessor = getattr(model, 'data_preprocessor', None)
    # OpenCV's order in the libraries; videos are RGB.
    is_rgb = bool(reader) and (reader['type'] == 'LoadVideo' or stored)
    turns = [step.get(key) for step in steps for key in ('to_rgb', 'to_bgr')]
    turns += [getattr(preprocessor, key, False) for key in ('to_rgb', '_channel_conversion')]
    return 'RGB' if is_rgb != (sum(map(bool, turns)) % 2 == 1) else 'BGR'


def _padding(preprocessor: nn.Module | None) -> dict[str, Any]:
    value = getattr(preprocessor, 'pad_value', 0)
    if hasattr(preprocessor, 'seg_pad_val') and hasattr(preprocessor, 'test_cfg'):  # mmseg's
        settings = preprocessor.test_cfg or {}
        size, divisor = settings.get('size'), settings.get('size_divisor')
    else:
        size, divisor = None, getattr(preprocessor, 'pad_size_divisor', 1)
    if size:
        return {'size': list(size), 'value': value}
    return {'divisor': divisor, 'value': value} if divisor and divisor > 1 else {}


def _outputs(cfg: Config, model: nn.Module) -> dict[str, Any]:
    if hasattr(model, 'decode_head'):
        last = model.decode_head
        last = last[-1] if isinstance(last, nn.ModuleList) else last
        described = {
            'output': 'logits',
            'activation': 'softmax',
            'align_corners': model.align_corners,
        }
        if last.out_channels == 1:
            described.update(activation='sigmoid', threshold=last.threshold)
        settings = model.test_cfg
        if settings.get('mode') == 'slide':
            window = {key: list(settings[key]) for key in ('crop_size', 'stride')}
            described['sliding_window'] = window
        return described
    if cfg.get('default_scope') == 'mmdet':
        return {'output': 'feature maps'}
    head = getattr(model, 'head', None)
    if head is None:
        return {'output': 'features'}
    kinds = {cls.__name__ for cls in type(head).__mro__}
    regresses = 'RegressionHead' in kinds
    activation = 'sigmoid' if 'MultiLabelClsHead' in kinds else 'none' if regresses else 'softmax'
    return {'output': 'logits', 'activation': activation}
