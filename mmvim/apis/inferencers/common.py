"""Common parts of the inferencers: models and weights by their names in mmvim, images, results."""

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from torch import nn

from mmvim.checkpoints.loading import load_weights
from mmvim.engine.class_names import listed
from mmvim.engine.tasks import TASKS
from mmvim.errors import CheckpointError, SampleError

from ..model_zoo import build_model, published_weights
from .pipeline import InferencePipeline, class_names
from .text import fonts_for, write_lines

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')

#: Number of classes in a classifier's prediction.
TOP = 5

OnError = Callable[[int, SampleError], None]
Images = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]


@dataclass
class Result:
    """Prediction of a model for an image.

    Attributes:
        name: The image's path, or its number.
        image: The image as it was read, BGR uint8, for drawing.
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
            entry.path
            for entry in os.scandir(name)
            if entry.name.lower().endswith(SUFFIXES) and entry.is_file()
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


def make_model(name: Any, cfg: Config, weights: Any) -> nn.Module:
    """Build a config's model, load its weights and determine its class names."""
    model = build_model(cfg)
    if weights is True:
        weights = published_weights(str(name))
    meta: dict[str, Any] = {}
    if weights:
        report = load_weights(model, weights)
        lacking = sorted(set(report.missing) & {name for name, _ in model.named_parameters()})
        if lacking:
            raise CheckpointError(
                f'checkpoint {str(weights)!r} is of another model: it lacks {len(lacking)} of its '
                f'parameters: {", ".join(lacking[:3])}'
            )
        meta = report.dataset_meta
    else:
        print_log(
            'no weights were given: the model is random, and what it predicts means nothing',
            logger='current',
            level=logging.WARNING,
        )
    model.has_random_weights = not weights
    model.dataset_meta = class_names(cfg, meta)
    model.class_counts = _class_counts(model, cfg)
    names = model.dataset_meta.get('classes')
    if names and any(count != len(names) for count in model.class_counts.values()):
        # Names of other classes than the model's: numbers mislead nobody.
        for key in ('classes', 'palette'):
            model.dataset_meta.pop(key, None)
    model.cfg = model._config = cfg
    return model.eval()


def name_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Give the classes of a model their names.

    Args:
        model: A model of :func:`make_model`.
        names: One for each class.

    Raises:
        ValueError: There are more or fewer names than classes.
    """
    names = [names] if isinstance(names, str) else list(names)
    for key, count in model.class_counts.items():
        if count != len(names):
            raise ValueError(
                f'classes must be as many names as {key}, {count}, not {len(names)} {listed(names)}'
            )
    model.dataset_meta['classes'] = names


def _class_counts(model: nn.Module, cfg: Config) -> dict[str, int]:
    task = TASKS.get(cfg.get('default_scope'))
    return task.class_outputs(model) if task else {}


def ranked(scores: torch.Tensor, count: int, name: Callable[[int], str]) -> list[dict[str, Any]]:
    """The best classes as plain data: 'class', 'label' and 'score' of each."""
    values, labels = torch.topk(scores, min(count, len(scores)))
    return [
        {'class': name(label), 'label': label, 'score': round(value, 6)}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]


class Inference:
    """Mixin of the inferencers: a :meth:`predict` that works alike for every task."""

    def predict(
        self, inputs: Images, batch_size: int = 1, on_error: OnError | None = None
    ) -> Iterator[Result]:
        """Run the model, one batch at a time, without keeping earlier images.

        Args:
            inputs: See :func:`find_images`.
            batch_size: Images at a time. Defaults to 1.
            on_error: Called with the number and the error of an image that cannot be read, which
                is then left out. Defaults to None: the error is raised.

        Raises:
            SampleError: There are no images, or one cannot be read.
            ValueError: ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}')
        for batch in self._batches(self._read(inputs, on_error), batch_size):
            with torch.no_grad():
                samples = self.model.test_step(pseudo_collate([data for *_, data in batch]))
            for (name, picture, _), sample in zip(batch, samples, strict=True):
                yield Result(name, picture, sample, {'image': name, **self._plain(sample)})

    def _read(
        self, inputs: Images, on_error: OnError | None
    ) -> Iterator[tuple[str, np.ndarray, dict]]:
        for i, image in enumerate(find_images(inputs)):
            try:
                picture, data = self.pipeline.read(image)
            except SampleError as error:
                if on_error is None:
                    raise
                on_error(i, error)
                continue
            yield image if isinstance(image, str) else str(i), picture, data

    def _batches(self, items: Iterable[tuple], size: int) -> Iterator[list[tuple]]:
        """Batches of items, whose last parts are samples that fit each other."""
        batch: list[tuple] = []
        for item in items:
            if batch and (len(batch) == size or not self._fits(item[-1], batch[-1][-1])):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _fits(self, data: dict, other: dict) -> bool:
        """Whether two samples can be in one batch: by default each size has its own."""
        return data['inputs'].shape == other['inputs'].shape

    def draw(self, result: Result, *args: Any, **options: Any) -> np.ndarray:
        """Draw a result over its image, in RGB; a model of random weights says so on it."""
        with fonts_for(self.class_names or ()):
            picture = self._draw(result, *args, **options)
        if self.model.has_random_weights:
            picture = write_lines(picture, ['random weights'], [(255, 60, 60)], below=True)
        return picture

    def _draw(self, result: Result, **options: Any) -> np.ndarray:
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


class LibraryInference(Inference):
    """Mixin of the inferencers that derive from a task library's: same pipeline, same batches."""

    def _init_pipeline(self, cfg: Config) -> InferencePipeline:
        return InferencePipeline(cfg)

    def _init_collate(self, cfg: Config) -> Callable:
        return pseudo_collate

    def _get_chunk_data(self, inputs: Iterable[Any], chunk_size: int) -> Iterator[list]:
        for batch in self._batches(((data,) for data in inputs), chunk_size):
            yield [data for (data,) in batch]


class EngineInference(LibraryInference):
    """The same for the libraries whose inferencers are mmengine's."""

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
