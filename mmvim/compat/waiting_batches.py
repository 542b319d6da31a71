"""Data preprocessors and batch augmentations that do not wait for the GPU.

Why: mmpretrain's preprocessor copies labels synchronously, makes one-hot labels sample by sample,
and its Mixup and CutMix index with a permutation on the CPU; mmengine's and mmsegmentation's
preprocessors index channels with a list. In every iteration each of these waits until the GPU has
finished all its work.

How: labels and permutations go through pinned memory, all one-hot labels are made at once, channels
are flipped. The results are the same, from the same random numbers. Unusual cases (several labels
or scores per sample, other numbers of channels) take the original path.

Obsolete with: versions of these packages that do not wait (onedl-mmengine 0.10.12, onedl-mmpretrain
1.3.6 and onedl-mmsegmentation 1.4.2 do).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ._import_hook import replaces, when_imported

_MMPRETRAIN = 'mmpretrain.models.utils'


def install() -> None:
    """Act when the modules are imported."""
    when_imported(f'{_MMPRETRAIN}.data_preprocessor', _patch_classification)
    when_imported(f'{_MMPRETRAIN}.batch_augments.mixup', _patch_mixup)
    when_imported(f'{_MMPRETRAIN}.batch_augments.cutmix', _patch_cutmix)
    when_imported('mmengine.model.base_model.data_preprocessor', _patch_channels)
    when_imported('mmseg.models.data_preprocessor', _patch_channels)


def to_device(tensor: Any, device: Any) -> Any:
    """Copy a small CPU tensor to a device, without waiting if the device is a GPU."""
    if device.type == 'cuda' and tensor.device.type == 'cpu':
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _patch_classification(module: ModuleType) -> None:
    import torch

    @replaces(module.ClsDataPreprocessor, 'forward')
    def forward(original: Callable, self: Any, data: dict, training: bool = False) -> dict:
        samples = data.get('data_samples')
        classes = self.num_classes
        usual = samples and all(
            type(sample) is module.DataSample
            and 'gt_score' not in sample
            and len(sample.get('gt_label', ())) == 1
            and sample.get('num_classes', classes) == classes
            for sample in samples
        )
        if not training or not usual or (self.to_onehot and classes is None):
            return original(self, data, training)
        inputs = original(self, {'inputs': data['inputs']}, training)['inputs']
        labels = to_device(torch.cat([sample.gt_label for sample in samples]), self.device)
        if self.to_onehot:
            scores = torch.nn.functional.one_hot(labels, classes)
            if self.batch_augments is not None:
                inputs, scores = self.batch_augments(inputs, scores)
            _set_fields(samples, 'gt_score', scores.unbind())
            for sample in samples:
                if 'num_classes' not in sample:
                    sample.set_field(classes, 'num_classes', field_type='metainfo')
        _set_fields(samples, 'gt_label', labels.split(1))
        return {'inputs': inputs, 'data_samples': samples}


def _set_fields(samples: list, name: str, values: Any) -> None:
    """Set a data field, whose kind is known, without the checks of ``set_field``."""
    for sample, value in zip(samples, values, strict=True):
        sample._data_fields.add(name)
        sample.__dict__[name] = value


def _patch_mixup(module: ModuleType) -> None:
    import numpy as np

    @replaces(module.Mixup, 'mix')
    def mix(_: Callable, self: Any, batch_inputs: Any, batch_scores: Any) -> tuple:
        share = np.random.beta(self.alpha, self.alpha)
        others = _permutation(batch_inputs)
        inputs = share * batch_inputs + (1 - share) * batch_inputs[others]
        return inputs, share * batch_scores + (1 - share) * batch_scores[others]


def _patch_cutmix(module: ModuleType) -> None:
    import numpy as np

    @replaces(module.CutMix, 'mix')
    def mix(_: Callable, self: Any, batch_inputs: Any, batch_scores: Any) -> tuple:
        share = np.random.beta(self.alpha, self.alpha)
        others = _permutation(batch_inputs)
        box, share = self.cutmix_bbox_and_lam(batch_inputs.shape[-2:], share)
        top, bottom, left, right = box
        box = (..., slice(top, bottom), slice(left, right))
        batch_inputs[box] = batch_inputs[box][others]
        return batch_inputs, share * batch_scores + (1 - share) * batch_scores[others]


def _permutation(batch: Any) -> Any:
    import torch

    return to_device(torch.randperm(len(batch)), batch.device)


def _patch_channels(module: ModuleType) -> None:
    names = ('ImgDataPreprocessor', 'SegDataPreProcessor')
    # mmsegmentation's module also contains mmengine's names.
    owner = next(o for o in map(vars(module).get, names) if o and o.__module__ == module.__name__)

    @replaces(owner, 'forward')
    def forward(original: Callable, self: Any, data: dict, training: bool = False) -> Any:
        if not self._channel_conversion or not isinstance(data, dict):
            return original(self, data, training)
        data = self.cast_data(data)
        inputs = data['inputs']
        images = [inputs] if hasattr(inputs, 'shape') else inputs
        if any(image.shape[-3] != 3 for image in images):
            return original(self, data, training)
        flipped = [image.flip(-3) for image in images]
        data = {**data, 'inputs': flipped[0] if images is not inputs else flipped}
        self._channel_conversion = False
        try:
            return original(self, data, training)
        finally:
            self._channel_conversion = True
