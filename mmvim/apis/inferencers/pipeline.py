"""The test data of a config: its pipeline, for images outside of a data set, and class names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from mmvim._configs import innermost_dataset, type_name
from mmvim.datasets.video.lists import read_classes
from mmvim.engine.tasks import TASKS, check_packed
from mmvim.errors import SampleError, unreadable

VIDEO_LOADER = 'LoadVideo'
_META = ('classes', 'palette')


def transforms_of(cfg: Config) -> list[dict]:
    """Configs of the transforms of a config's test pipeline."""
    dataset = innermost_dataset(cfg.get('test_dataloader'))
    return list(dataset.get('pipeline') or cfg.get('test_pipeline') or [])


def reads_videos(cfg: Config) -> bool:
    """Whether a config's test pipeline begins with a video file."""
    return [type_name(transform) for transform in transforms_of(cfg)[:1]] == [VIDEO_LOADER]


def class_names(cfg: Config, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Classes and palette: of a checkpoint's ``dataset_meta`` or, where it is silent, a config."""
    known = {k.lower(): v for k, v in meta.items() if v and k.lower() in _META}
    return {**_config_meta(cfg), **known}


def _config_meta(cfg: Config) -> dict[str, Any]:
    """Classes and palette, of the config or of the class of its test data."""
    dataset = innermost_dataset(cfg.get('test_dataloader'))
    meta: dict[str, Any] = {}
    kind = dataset.get('type')
    if isinstance(kind, str):
        with (
            DefaultScope.overwrite_default_scope(cfg.get('default_scope')),
            DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry,
        ):
            kind = registry.get(kind)
    meta.update(getattr(kind, 'METAINFO', {}))
    meta.update(dataset.get('metainfo') or {})
    file = os.path.join(dataset.get('data_root') or '', dataset.get('label_file') or '')
    if 'classes' not in meta and os.path.isfile(file):
        meta['classes'] = read_classes(file)
    if cfg.get('classes') and 'classes' not in meta:
        meta['classes'] = cfg.classes
    return {k: v for k, v in meta.items() if k in _META}


class InferencePipeline:
    """The processing of an image in ``tools/test.py``, without annotations.

    A file is read by the config's own first transform, with its colour type, channels, bit depth
    and orientation. Pixels are taken as the output of that transform.

    Args:
        cfg: A config of mmpretrain, mmdet or mmsegmentation.
        size: Height and width to which images are resized, instead of all steps of the pipeline
            between reading and packing. Defaults to None.

    Raises:
        ValueError: The config has no test pipeline.
    """

    def __init__(self, cfg: Config, size: tuple[int, int] | None = None) -> None:
        transforms = transforms_of(cfg)
        if not transforms:
            raise ValueError('the config has no test pipeline (test_dataloader.dataset.pipeline)')
        names = [type_name(t) for t in transforms]
        if size is not None:
            resize = {'type': 'mmcv.Resize', 'scale': size[::-1]}
            transforms = [transforms[0], resize, transforms[-1]]
            names = [names[0], 'Resize', names[-1]]
        self._scope = cfg.get('default_scope')
        self._of_files = next((i for i, n in enumerate(names, 1) if n.startswith('Load')), 0)
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            self._transforms = [
                (number, transform if callable(transform) else TRANSFORMS.build(transform))
                for number, (transform, name) in enumerate(zip(transforms, names, strict=True), 1)
                if not (name.startswith('Load') and 'Annotation' in name)
            ]

    def __call__(self, image: str | Path | np.ndarray | Mapping) -> Any:
        """The packed sample of an image: a file, its pixels, or a sample with 'img'."""
        return self.read(image)[1]

    def read(self, image: str | Path | np.ndarray | Mapping) -> tuple[np.ndarray, Any]:
        """Read an image.

        Args:
            image: A file, pixels (height, width[, channels]), or a sample that holds them as 'img'.

        Returns:
            The image as read, for drawing, BGR uint8 (height, width, 3), and the packed sample.

        Raises:
            SampleError: The image cannot be read.
        """
        if isinstance(image, Mapping):
            image = image['img'] if 'img' in image else image['img_path']
        from_file = isinstance(image, (str, Path))
        if from_file:
            results, picture = {'img_path': str(image)}, None
        else:
            shape = image.shape[:2]
            results = {'img': image, 'img_path': None, 'img_shape': shape, 'ori_shape': shape}
            picture = displayable(image)
        # mmdet packs a number that only data sets provide.
        results['img_id'] = 0
        for number, transform in self._transforms:
            if number <= self._of_files and not from_file:
                continue
            try:
                results = transform(results)
            except Exception as error:
                if picture is not None:
                    raise
                reason = unreadable(str(image), error)
                raise SampleError(f'cannot read the image {str(image)!r}: {reason}') from error
            if picture is None:
                if results is None:
                    raise SampleError(f'cannot read the image {str(image)!r}')
                if results.get('img') is not None:
                    picture = displayable(results['img'])
        task, sample = TASKS.get(self._scope), (results or {}).get('data_samples')
        if task is not None and sample is not None:
            check_packed(task, sample, "the config's test pipeline")
        return picture, results


def displayable(pixels: np.ndarray) -> np.ndarray:
    """A BGR uint8 picture (height, width, 3) of an image of any depth and number of channels.

    The first three channels are shown, or the first one if there are fewer. Values of other depths
    than 8 bits are stretched from the least to the greatest.

    Args:
        pixels: (height, width) or (height, width, channels).
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    if shown.dtype == np.uint8:
        return shown.copy()
    shown = np.nan_to_num(shown.astype(np.float64))
    low, high = float(shown.min(initial=0)), float(shown.max(initial=0))
    # 8-bit values that the pipeline has converted to floats.
    if not (low >= 0 and 1 < high <= 255):
        shown = (shown - low) * (255 / max(high - low, 1e-12))
    return shown.round().astype(np.uint8)
