"""Common parts of the inferencers: models and weights by their names in mmvim, images, results."""

import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmvim.checkpoints.files import read_checkpoint
from mmvim.checkpoints.loading import load_weights
from mmvim.errors import CheckpointError, SampleError

from ..model_zoo import build_model, model_info

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')

#: Number of classes in a classifier's prediction.
TOP = 5

_META = ('classes', 'palette')
#: Smaller pictures are enlarged before text is drawn on them.
_LEGIBLE = 224

Images = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]


@dataclass
class Result:
    """Prediction of a model for an image.

    Attributes:
        name: Path of the image, or its number.
        image: The image, BGR.
        sample: The library's data sample.
        prediction: The prediction as plain data, ready for JSON.
    """

    name: str
    image: np.ndarray
    sample: Any
    prediction: dict[str, Any]


def find_images(inputs: Images) -> list[str | np.ndarray]:
    """List images: a file, a folder (its images, sorted), a pattern, an array, or several of these.

    Raises:
        SampleError: There is no such file, no image in the folder, or no match.
    """
    if isinstance(inputs, np.ndarray):
        return [inputs]
    if not isinstance(inputs, str | Path):
        return [image for part in inputs for image in find_images(part)]
    name = str(inputs)
    if os.path.isdir(name):
        found = sorted(
            entry.path for entry in os.scandir(name) if entry.name.lower().endswith(SUFFIXES)
        )
        if not found:
            raise SampleError(f'no image in the folder {name!r} (of {", ".join(SUFFIXES)})')
        return found
    if os.path.isfile(name):
        return [name]
    if glob.has_magic(name):
        found = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
        if found:
            return found
        raise SampleError(f'no file matches {name!r}')
    raise SampleError(f'the image {name!r} does not exist')


def read_image(image: str | np.ndarray) -> np.ndarray:
    """Read an image as BGR.

    Raises:
        SampleError: The image cannot be read.
    """
    if isinstance(image, np.ndarray):
        return image
    try:
        read = mmcv.imread(image)
    except Exception as error:
        raise SampleError(f'cannot read the image {image!r}: {error}') from error
    if read is None:
        raise SampleError(f'cannot read the image {image!r}: it is no image, or damaged')
    return read


def make_model(name: Any, cfg: Config, weights: Any) -> nn.Module:
    """Build a config's model, load its weights and determine its class names."""
    model = build_model(cfg)
    if weights is True:
        weights = model_info(str(name)).weights
        if weights is None:
            raise ValueError(f'no weights were published for {name!r}')
    meta: dict[str, Any] = {}
    if weights:
        content = read_checkpoint(weights)
        report = load_weights(model, content)
        lacking = sorted(set(report.missing) & {name for name, _ in model.named_parameters()})
        if lacking:
            raise CheckpointError(
                f'checkpoint {str(weights)!r} is of another model: it lacks {len(lacking)} of its '
                f'parameters: {", ".join(lacking[:3])}'
            )
        meta = dict((content.get('meta') or {}).get('dataset_meta') or {})
    else:
        print_log('no weights were given: the model is random', logger='current', level=30)
    known = {k.lower(): v for k, v in meta.items() if v and k.lower() in _META}
    model.dataset_meta = {**_config_meta(cfg), **known}
    model.cfg = model._config = cfg
    return model.eval()


def _config_meta(cfg: Config) -> dict[str, Any]:
    """Classes and palette, of the config or of the class of its test data."""
    from mmengine.registry import DATASETS, DefaultScope

    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    meta: dict[str, Any] = {}
    if isinstance(dataset.get('type'), str):
        with (
            DefaultScope.overwrite_default_scope(cfg.get('default_scope')),
            DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry,
        ):
            kind = registry.get(dataset['type'])
        meta.update(getattr(kind, 'METAINFO', {}))
    meta.update(dataset.get('metainfo') or {})
    if cfg.get('classes') and 'classes' not in meta:
        meta['classes'] = cfg.classes
    return {k: v for k, v in meta.items() if k in _META}


def ranked(scores: torch.Tensor, count: int, name: Callable[[int], str]) -> list[dict[str, Any]]:
    """The best classes as plain data: 'class', 'label' and 'score' of each."""
    values, labels = torch.topk(scores, min(count, len(scores)))
    return [
        {'class': name(label), 'label': label, 'score': round(value, 6)}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]


def label_picture(picture: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """Write lines into the upper left corner of an RGB picture; small ones are enlarged."""
    import cv2

    height, width = picture.shape[:2]
    factor = max(1, math.ceil(_LEGIBLE / min(height, width)))
    size = (width * factor, height * factor)
    picture = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_NEAREST)
    scale = max(min(picture.shape[:2]) / 480, 0.35)
    for i, line in enumerate(lines):
        place = (round(8 * scale), round((i + 1) * 26 * scale))
        for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
            cv2.putText(
                picture,
                line,
                place,
                cv2.FONT_HERSHEY_SIMPLEX,
                0.8 * scale,
                colour,
                max(1, round(thickness * scale)),
                cv2.LINE_AA,
            )
    return picture


class Inference:
    """Mixin of the inferencers: a :meth:`predict` that works alike for every task."""

    def predict(self, inputs: Images, batch_size: int = 1) -> Iterator[Result]:
        """Run the model, one batch at a time, without keeping earlier images.

        Args:
            inputs: See :func:`find_images`.
            batch_size: Images at a time. Defaults to 1.

        Raises:
            SampleError: There are no images, or one cannot be read.
            ValueError: ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}')
        found = find_images(inputs)
        for start in range(0, len(found), batch_size):
            part = found[start : start + batch_size]
            images = [read_image(image) for image in part]
            for i, (given, image, sample) in enumerate(
                zip(part, images, self._samples(images), strict=True), start
            ):
                name = given if isinstance(given, str) else str(i)
                yield Result(name, image, sample, {'image': name, **self._plain(sample)})

    def draw(self, result: Result, **options: Any) -> np.ndarray:
        """Draw a result over its image, in RGB."""
        raise NotImplementedError

    def _samples(self, images: list[np.ndarray]) -> list:
        raise NotImplementedError

    def _plain(self, sample: Any) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes, or None if they are unknown."""
        return self.model.dataset_meta.get('classes')

    def _class_name(self, label: int) -> str:
        names = self.class_names
        return str(names[label]) if names and label < len(names) else str(label)


class OneSizeBatches:
    """Mixin that batches images by their size after the pipeline."""

    def _get_chunk_data(self, inputs: Iterable[dict], chunk_size: int) -> Iterator[list[dict]]:
        batch: list[dict] = []
        for data in inputs:
            if batch and (
                len(batch) == chunk_size or data['inputs'].shape != batch[0]['inputs'].shape
            ):
                yield batch
                batch = []
            batch.append(data)
        if batch:
            yield batch


class EngineInference(Inference):
    """The mixin for libraries whose inferencers derive from mmengine's."""

    def _start(self, model: Any, weights: Any, device: Any, **options: Any) -> None:
        from ..model_zoo import load_config

        self._given_name = model
        cfg = load_config(model)
        # Pictures are drawn on demand, and nothing else is written.
        cfg.visualizer.vis_backends = None
        super().__init__(model=cfg, weights=weights, device=device, **options)
        # No argument: the inferencer of OpenMMLab's mmsegmentation takes none.
        self.show_progress = False

    def _init_model(self, cfg: Any, weights: Any, device: Any = 'cpu') -> nn.Module:
        return make_model(self._given_name, cfg, weights).to(device)
