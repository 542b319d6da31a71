"""Gradient-based maps of the pixels on which a feature or a class depends."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .subjects import backbone_of


def effective_receptive_field(backbone: nn.Module, images: Tensor) -> Tensor:
    """Contribution of each pixel to the features at the centre of the last map.

    The absolute gradient of the sum of these features' absolute values with respect to the pixels,
    summed over channels and averaged over the images (Luo et al.,
    https://arxiv.org/abs/1701.04128), divided by its largest value. The sum of the features
    themselves would be constant after a layer norm.

    Args:
        backbone: A backbone with ``out_type='featmap'``.
        images: (batch, channels, height, width), preprocessed.

    Returns:
        (height, width), 0 to 1.

    Raises:
        ValueError: The last output is not a map, or no pixel contributes.
    """
    images = images.detach().requires_grad_()
    features = backbone(images)[-1]
    if features.dim() != 4:
        raise ValueError(
            f"the backbone's last output must be a map, not {tuple(features.shape)}: "
            "out_type='featmap'"
        )
    rows, columns = features.shape[2:]
    middle = features[:, :, rows // 2, columns // 2].abs().sum()
    (gradient,) = torch.autograd.grad(middle, images)
    field = gradient.abs().sum(1).mean(0)
    if not field.max() > 0:
        raise ValueError('no pixel contributes to the middle of the last map')
    return field / field.max()


def high_contribution_area(
    field: Tensor, shares: tuple[float, ...] = (0.2, 0.3, 0.5, 0.99)
) -> Mapping[float, float]:
    """Areas of the central squares that hold given shares of a receptive field.

    Args:
        field: Result of :func:`effective_receptive_field`.
        shares: Shares of the field's sum. Defaults to those of Ding et al. (arXiv 2203.06717).

    Returns:
        For each share, the area of the square relative to the image.
    """
    height, width = field.shape
    total = field.sum()
    sums = []
    for k in range(1, 101):
        rows, columns = max(round(height * k / 200), 1), max(round(width * k / 200), 1)
        top, left = height // 2 - rows, width // 2 - columns
        part = field[max(top, 0) : height // 2 + rows, max(left, 0) : width // 2 + columns]
        sums.append(float(part.sum() / total))
    return MappingProxyType(
        {
            share: (next((k for k, x in enumerate(sums, 1) if x >= share), 100) / 100) ** 2
            for share in shares
        }
    )


def default_cam_layer(model: nn.Module) -> str:
    """The backbone's layer for CAM: the last one at which patches have an influence."""
    return f'backbone.{backbone_of(model).cam_layer}'


def class_activation_map(
    model: nn.Module, images: Tensor, target: int | None = None, layer: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM (Selvaraju et al., https://arxiv.org/abs/1610.02391) of a classifier.

    Args:
        model: A classifier with a backbone of mmvim.
        images: (batch, channels, [frames,] height, width), preprocessed.
        target: The class. Defaults to None: the best class of each image.
        layer: Name of the module whose first output is examined. Defaults to None:
            :func:`default_cam_layer`.

    Returns:
        Maps (batch, [steps,] rows, columns), 0 to 1, the classes and their probabilities (batch,).

    Raises:
        ValueError: The model is not a classifier, or there is no such layer or class.
    """
    if getattr(model, 'head', None) is None:
        raise ValueError(f'{type(model).__name__} has no head that classifies')
    layer = layer or default_cam_layer(model)
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f'the model has no module {layer!r}; for example {_examples(modules)}')
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    # The layer's output needs gradients even if its parameters are frozen.
    images = images.detach().requires_grad_()
    handle = modules[layer].register_forward_hook(keep)
    try:
        logits = model(images, mode='tensor')
    finally:
        handle.remove()
    if target is not None and not 0 <= target < logits.shape[1]:
        raise ValueError(f'target={target} is no class; the model has {logits.shape[1]}')
    classes = logits.argmax(1) if target is None else torch.full_like(logits[:, 0], target).long()
    chosen = logits.gather(1, classes[:, None]).sum()
    values = kept[0]
    (gradient,) = torch.autograd.grad(chosen, values)
    if values.dim() == 4:
        if backbone_of(model).channels_last and not isinstance(modules[layer], nn.Conv2d):
            values, gradient = (x.permute(0, 3, 1, 2) for x in (values, gradient))
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        maps = (weights * values).sum(1)
    else:
        weights = gradient.mean(dim=1, keepdim=True)
        layout = backbone_of(model).token_layout(images.shape, layer)
        maps = layout.to_map((weights * values).sum(-1))
    maps = maps.detach().clamp(min=0)
    largest = maps.flatten(1).amax(1).clamp(min=torch.finfo(maps.dtype).tiny)
    maps = maps / largest.view(-1, *(1,) * (maps.dim() - 1))
    probabilities = logits.detach().float().softmax(1).gather(1, classes[:, None])[:, 0]
    return maps, classes, probabilities


def _examples(modules: Mapping[str, nn.Module]) -> str:
    norms = [name for name in modules if name.endswith(('.norm', '.norm1'))]
    return ', '.join(norms[-3:]) or ', '.join(list(modules)[1:4])
