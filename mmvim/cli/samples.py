"""Errors that name the file when an image or an annotation cannot be loaded."""

import os
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.dataset import Compose

from mmvim.compat._import_hook import replaces, when_imported
from mmvim.errors import SampleError, unfit_for_pillow, unreadable

_PATH_KEYS = ('img_path', 'seg_map_path', 'filename', 'img_paths')


def install() -> None:
    """Make data pipelines name the file they could not load.

    OpenCV's and Pillow's own messages do not name the file, and in a DataLoader worker only the
    pipeline has the sample, so its ``__call__`` is wrapped. Only errors of loading transforms
    (``Load…``) are translated. Forked workers, mmengine's default, inherit this.
    """
    when_imported('mmseg.datasets.transforms.loading', _check_sizes)

    @replaces(Compose, '__call__')
    def call(original: Callable, self: Compose, data: dict) -> dict | None:
        try:
            return original(self, data)
        except SampleError:
            raise
        except Exception as error:
            message = _describe(error, data)
            if message is None:
                raise
            raise SampleError(message) from error


def _check_sizes(loading: ModuleType) -> None:
    """Make mmseg read deep label maps, and refuse colours and maps of another size."""

    @replaces(loading.LoadAnnotations, 'transform')
    def transform(original: Callable, self: Any, results: dict) -> dict:
        results = original(self, results)
        labels, size = results.get('gt_seg_map'), results.get('ori_shape')
        if labels is not None and labels.ndim != 2:
            raise ValueError(
                f'the label map has the shape {labels.shape}: it is a picture in colours, and not '
                'the number of a class for each pixel'
            )
        if labels is not None and size is not None and labels.shape[:2] != tuple(size[:2]):
            raise ValueError(
                f'the label map has {labels.shape[0]} x {labels.shape[1]} pixels and its image '
                f'{size[0]} x {size[1]}'
            )
        return results

    @replaces(loading.LoadAnnotations, '_load_seg_map')
    def load_seg_map(original: Callable, self: Any, results: dict) -> None:
        content = _deep(results['seg_map_path'], self.backend_args)
        if content is None:
            return original(self, results)
        backend = self.imdecode_backend
        labels = loading.mmcv.imfrombytes(content, flag='unchanged', backend=backend).squeeze()
        if labels.max(initial=0) < 256:
            return original(self, results)
        if results.get('reduce_zero_label') or labels.max() > 65535:
            raise ValueError(
                f'the label map has the label {labels.max()}; 255 is the most with '
                'reduce_zero_label, and 65535 without'
            )
        mapped = labels.astype(np.uint16)
        for old, new in (results.get('label_map') or {}).items():
            mapped[labels == old] = new
        results['gt_seg_map'] = mapped
        results['seg_fields'].append('gt_seg_map')


def _deep(path: str, backend_args: dict | None) -> bytes | None:
    """Content of a file that may be more than 8 bits deep, which mmseg reads modulo 256."""
    name = str(path).lower()
    if name.endswith('.png') and os.path.isfile(path):
        with open(path, 'rb') as file:
            header = file.read(25)
        # The depth of a PNG is the first byte after its width and height.
        if len(header) < 25 or header[24] <= 8:
            return None
    elif not name.endswith(('.png', '.tif', '.tiff')):
        return None
    return fileio.get(path, backend_args=backend_args)


def _describe(error: Exception, data: Any) -> str | None:
    unfit = unfit_for_pillow(error)
    if unfit and isinstance(data, dict):
        return f'{data.get("img_path")!r}: {unfit}'
    loaders = [
        type(frame.f_locals['self']).__name__
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if 'self' in frame.f_locals and type(frame.f_locals['self']).__name__.startswith('Load')
    ]
    if not loaders or not isinstance(data, dict):
        return None
    loader = loaders[0]
    if 'Annotations' in loader and data.get('seg_map_path'):
        kind, path = 'annotation', data['seg_map_path']
    else:
        path = next((data[key] for key in _PATH_KEYS if data.get(key)), None)
        kind = 'the annotation of' if 'Annotations' in loader else 'image'
    if path is None:
        return None
    return (
        f'cannot load {kind} {str(path)!r} ({loader}): {unreadable(path, error)}; a training set '
        'in mmvim.SkipFailures goes on without such files'
    )
