"""Pictures of the batches of a data loader: after augmentation, mixing and padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor

from mmvim.apis.inferencers.pipeline import class_names, displayable
from mmvim.apis.model_zoo import build_model
from mmvim.export.metadata import describe

from .pictures import _pyplot, _save

#: Frames of a clip that are shown.
FRAMES = 3


@dataclass
class Sample:
    """A sample as the model gets it.

    Attributes:
        picture: RGB uint8 (height, width, 3); of a clip some frames side by side.
        title: Classes, with their shares after mixing.
        boxes: (count, 4) x1, y1, x2, y2 in pixels, with their ``names``.
        names: Classes of the boxes.
        labels: Class of each pixel, (height, width), or None.
    """

    picture: np.ndarray
    title: str = ''
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    names: Sequence[str] = ()
    labels: np.ndarray | None = None


def browse(cfg: Config, split: str = 'train', seed: int = 0) -> Iterator[Sample]:
    """Samples of a config's data loader after the model's data preprocessor.

    Args:
        cfg: A config of mmpretrain, mmdet or mmsegmentation.
        split: 'train', 'val' or 'test'. Defaults to 'train'.
        seed: Seed of order and augmentation. Defaults to 0.

    Raises:
        ValueError: The config has no such data loader.
    """
    loader = cfg.get(f'{split}_dataloader')
    if not loader:
        raise ValueError(f'the config has no {split}_dataloader')
    settings = {**loader, 'num_workers': 0, 'persistent_workers': False, 'pin_memory': False}
    settings.pop('prefetch_factor', None)
    model = build_model(cfg)
    torch.manual_seed(seed)
    np.random.seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        batches = Runner.build_dataloader(settings, seed=seed)
        meta = getattr(batches.dataset, 'metainfo', None) or {}
        names = class_names(cfg, meta).get('classes') or ()
        about = describe(cfg, model)
        for data in batches:
            data = model.data_preprocessor(data, split == 'train')
            for pixels, sample in zip(data['inputs'], data['data_samples'], strict=True):
                yield _sample(pixels, sample, names, about)


def _sample(pixels: Tensor, sample: Any, names: Sequence[str], about: dict) -> Sample:
    picture = _picture(pixels, about)

    def name(label: int) -> str:
        return str(names[label]) if label < len(names) else str(label)

    if getattr(sample, 'gt_sem_seg', None) is not None:
        return Sample(picture, labels=sample.gt_sem_seg.data.reshape(picture.shape[:2]).numpy())
    found = getattr(sample, 'gt_instances', None)
    if found is not None:
        boxes = getattr(found.bboxes, 'tensor', found.bboxes)
        return Sample(picture, '', boxes.numpy(), [name(i) for i in found.labels.tolist()])
    scores = sample.get('gt_score')
    if scores is not None:
        present = [i for i in scores.argsort(descending=True).tolist() if scores[i] > 0][:3]
        shares = (f'{name(i)} {float(scores[i]):.0%}' for i in present)
        return Sample(picture, ', '.join(shares))
    labels = sample.get('gt_label')
    return Sample(picture, '' if labels is None else ', '.join(map(name, labels.tolist())))


def _picture(pixels: Tensor, about: dict) -> np.ndarray:
    """Undo the normalisation; of several views the first is shown, of a clip some frames."""
    if pixels.dim() == 5:
        pixels = pixels[0]
    shape = (-1, *[1] * (pixels.dim() - 1))
    if 'mean' in about:
        mean, std = (torch.tensor(about[key]).view(shape) for key in ('mean', 'std'))
        pixels = pixels * std + mean
    if pixels.dim() == 4:
        chosen = torch.linspace(0, pixels.shape[1] - 1, min(FRAMES, pixels.shape[1])).long()
        pixels = torch.cat(pixels[:, chosen].unbind(1), dim=-1)
    channels = pixels.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    if about['channels'] == 'RGB':
        channels = channels[..., ::-1]
    return displayable(np.ascontiguousarray(channels))[..., ::-1].copy()


def draw_samples(samples: Sequence[Sample], out: str | Path, columns: int = 4) -> Path:
    """Draw samples in a grid, with their classes, boxes or label maps.

    Args:
        samples: The samples.
        out: File to write.
        columns: Pictures in a row. Defaults to 4.
    """
    plt = _pyplot()
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 3.2 * rows), squeeze=False, layout='constrained'
    )
    for axis in axes.flat:
        axis.axis('off')
    for axis, sample in zip(axes.flat, samples, strict=False):
        axis.imshow(sample.picture)
        axis.set_title(sample.title, fontsize=8)
        if sample.labels is not None:
            # 255 is what the losses ignore.
            shown = np.ma.masked_equal(sample.labels, 255)
            axis.imshow(shown, cmap='tab20', alpha=0.5, vmin=0, vmax=19, interpolation='nearest')
        for box, name in zip(sample.boxes, sample.names, strict=True):
            size = box[2] - box[0], box[3] - box[1]
            axis.add_patch(plt.Rectangle(box[:2], *size, fill=False, color='red'))
            axis.text(*box[:2], name, color='white', fontsize=7, backgroundcolor='red')
    return _save(figure, out)
