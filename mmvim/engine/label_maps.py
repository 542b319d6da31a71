"""Label maps and other pictures of a test, written under names that do not collide."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from PIL import Image

from mmvim._configs import leaf_datasets
from mmvim.registry import METRICS


def image_root(cfg: Config) -> str:
    """The folder that holds all images of a config's test data."""
    folders = []
    for _, dataset in leaf_datasets((cfg.get('test_dataloader') or {}).get('dataset'), ''):
        prefix = dataset.get('data_prefix') or ''
        if not isinstance(prefix, str):
            prefix = prefix.get('img_path') or prefix.get('img') or ''
        folders.append(os.path.abspath(os.path.join(dataset.get('data_root') or '', prefix)))
    return os.path.commonpath(folders) if folders else os.getcwd()


def name_below(root: str, path: str) -> str:
    """The path of an image below ``root``, or its whole path without the leading separator.

    Equal names in different folders stay different.
    """
    path = os.path.abspath(path)
    name = os.path.relpath(path, root)
    return os.path.splitdrive(path)[1].lstrip(os.sep) if name.startswith(os.pardir) else name


@METRICS.register_module()
class LabelMapDump(BaseMetric):
    """Write the predicted label map of each image as a PNG, in place of a metric.

    A map is 8 bits deep, or 16 if there are more classes than fit. Data sets that reduce the zero
    label get 1 added, as mmseg does, so that 0 is again "other".

    Args:
        directory: Where to write; folders below ``root`` are kept.
        root: Folder of the images.
    """

    def __init__(self, directory: str, root: str) -> None:
        super().__init__()
        self.directory, self.root = directory, root
        self._written: dict[Path, str] = {}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Write the maps of a batch."""
        classes = len((self.dataset_meta or {}).get('classes') or ())
        for sample in data_samples:
            labels = sample['pred_sem_seg']['data'].squeeze().cpu().numpy()
            shift = int(bool(sample.get('reduce_zero_label', False)))
            most = max(classes - 1, int(labels.max(initial=0))) + shift
            image = name_below(self.root, sample['img_path'])
            path = Path(self.directory, image).with_suffix('.png')
            if self._written.setdefault(path, image) != image:
                path = Path(self.directory, f'{image}.png')  # beside an image of another suffix
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = (labels + shift).astype(np.uint8 if most < 256 else np.uint16)
            Image.fromarray(labels).save(path)
            self.results.append(None)

    def compute_metrics(self, results: list) -> dict:
        """There is nothing to compute."""
        return {}
