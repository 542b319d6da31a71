"""The models described by the metafiles of ``configs/``, by name.

``model-index.yml`` lists the metafiles. Accuracies are those reported by the authors, and weights
are the authors' files.
"""

import copy
import difflib
import fnmatch
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.logging import print_log
from torch import nn

from mmvim._configs import read_config
from mmvim.compat import mmengine_configs

INDEX = 'model-index.yml'
#: default_scope of a config: its tasks, in the words of the metafiles.
_LIBRARIES = MappingProxyType(
    {'mmpretrain': 'classification', 'mmdet': 'detection', 'mmseg': 'segmentation'}
)


@dataclass(frozen=True)
class ModelInfo:
    """A model as described by its metafile.

    Attributes:
        name: Name of the model.
        config: Path of its config.
        weights: URL of the authors' weights, or None.
        collection: Name of the family.
        parameters: Number of parameters.
        macs: Multiply-accumulates, or None if not stated.
        results: Entries with 'Task', 'Dataset', 'Metrics' and 'Source' (the reporter).
        entry: The entry of the metafile itself.
    """

    name: str
    config: Path
    weights: str | None
    collection: str
    parameters: int
    macs: int | None
    results: tuple[dict, ...] = ()
    entry: dict = field(default_factory=dict, repr=False, compare=False)


@functools.cache
def models() -> Mapping[str, ModelInfo]:
    """Every model of the zoo by its name.

    Raises:
        FileNotFoundError: The package was built without its configs.
    """
    root = mmengine_configs.root()
    found: dict[str, ModelInfo] = {}
    for metafile in load(root / INDEX)['Import']:
        for entry in load(root / metafile)['Models']:
            metadata = entry.get('Metadata', {})
            weights = entry.get('Weights')
            found[entry['Name']] = ModelInfo(
                name=entry['Name'],
                config=root / entry['Config'],
                weights=weights[0] if isinstance(weights, list) else weights,
                collection=entry['In Collection'],
                parameters=metadata.get('Parameters'),
                macs=metadata.get('FLOPs'),
                results=tuple(entry.get('Results', [])),
                entry=entry,
            )
    return MappingProxyType(found)


def list_models(pattern: str | None = None, *, pretrained: bool = False) -> list[str]:
    """List the names of the zoo's models.

    Args:
        pattern: A wildcard pattern such as ``'vim-*in1k'``. None lists all.
        pretrained: Whether to list only models with weights.

    Returns:
        Names, sorted.
    """
    names = models() if pattern is None else fnmatch.filter(models(), pattern)
    return sorted(name for name in names if not pretrained or models()[name].weights)


def model_info(name: str) -> ModelInfo:
    """Look up a model of the zoo.

    Raises:
        ValueError: There is no model of this name; the message suggests similar ones.
    """
    info = models().get(name)
    if info is None:
        close = difflib.get_close_matches(name, models(), n=3, cutoff=0.5)
        hint = f'similar names: {", ".join(close)}' if close else 'see mmvim.list_models()'
        raise ValueError(f'there is no model {name!r} in the zoo of mmvim; {hint}')
    return info


def published_weights(name: str) -> str:
    """URL of the authors' weights of a model of the zoo.

    Raises:
        ValueError: There is no model of this name, or it has no weights.
    """
    weights = model_info(name).weights
    if weights is None:
        raise ValueError(
            f'no weights were published for {name!r}; see list_models(pretrained=True)'
        )
    return weights


def load_config(model: str | Path | Config) -> Config:
    """Read the config of a model.

    Args:
        model: A name of the zoo, the path of a config, or a config, which is copied.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The file cannot be read as a config.
        ValueError: There is no model of this name.
    """
    if isinstance(model, Config):
        cfg = model.copy()
    elif str(model).endswith('.py'):
        if not Path(model).exists():
            raise FileNotFoundError(f'the config file {str(model)!r} does not exist')
        cfg = read_config(model)
    else:
        cfg = read_config(model_info(str(model)).config)
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config in the scope of its task library, as a runner does.

    Args:
        cfg: A config with ``model`` and ``default_scope``.

    Raises:
        ImportError: The task library is not installed.
        ValueError: The config has no ``model``.
    """
    from mmengine.registry import MODELS, DefaultScope

    from mmvim.compat import require

    if cfg.get('model') is None:
        raise ValueError(f'the config {cfg.filename!r} has no model')
    scope = cfg.get('default_scope') or 'mmengine'
    if scope in _LIBRARIES:
        require(f'{scope}.models', f'{_LIBRARIES[scope]} models')
    settings = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(settings)


def get_model(
    name: str | Path | Config,
    pretrained: bool | str | Path = False,
    *,
    device: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model of the zoo, or of a config.

    Args:
        name: A name of :func:`list_models`, the path of a config, or a config.
        pretrained: True loads the authors' weights of the model (downloaded and cached), a path or
            URL those of the file. With False the weights are random; files named in the config's
            ``init_cfg`` are not loaded. Defaults to False.
        device: Device of the model. Defaults to None: the CPU.
        **kwargs: Changes to the config's ``model``, such as ``backbone=dict(drop_path_rate=0.1)``.
            With ``head=dict(num_classes=10)`` the weights of another head are left out, which a
            warning says; the backbone must fit.

    Returns:
        The classifier, detector or segmentor, in evaluation mode, with its config as ``_config``;
        ``mmpretrain.inference_model`` takes a classifier of images.

    Raises:
        ValueError: There is no such model, or ``pretrained=True`` and it has no weights.
        FileNotFoundError: A file does not exist.
        mmvim.errors.CheckpointError: The weights do not fit the model.

    Example:
        >>> model = mmvim.get_model('vim-tiny_3rdparty_in1k', pretrained=True)
        >>> logits = model(torch.randn(1, 3, 224, 224), mode='tensor')
    """
    cfg = load_config(name)
    weights = None if pretrained is False or pretrained is None else pretrained
    if weights is True:
        if not isinstance(name, str) or name.endswith('.py'):
            raise ValueError('pretrained=True needs a name of the zoo; give a path or URL instead')
        weights = published_weights(name)
    if kwargs:
        # Merging removes keys such as _delete_ from its argument.
        cfg.merge_from_dict({'model': copy.deepcopy(kwargs)})
    model, meta = build_model(cfg), {}
    if weights is not None:
        from mmvim.checkpoints.loading import load_weights

        report = load_weights(model, str(weights), other_head=True)
        meta = report.dataset_meta
        if report.left_out:
            parts = [f'{n} {theirs} for {ours}' for n, (theirs, ours) in report.left_out.items()]
            print_log(
                f'{str(weights)!r}: left out for their shapes, and random in the model: '
                f'{", ".join(parts)}',
                logger='current',
                level=logging.WARNING,
            )
        if report.missing:
            print_log(
                f'{str(weights)!r} lacks {len(report.missing)} parameters and buffers of the '
                f'model, which stay as they were initialised: {", ".join(report.missing[:3])}',
                logger='current',
                level=logging.WARNING,
            )
    model._config = cfg
    if cfg.get('default_scope') == 'mmpretrain':
        _tell_mmpretrain(model, cfg, meta)
    if device is not None:
        model.to(device)
    return model.eval()


def _tell_mmpretrain(model: nn.Module, cfg: Config, meta: Mapping[str, Any]) -> None:
    """Set what ``mmpretrain.inference_model`` looks for: the task, and the names of the classes."""
    from .inferencers.pipeline import class_names, reads_videos

    if reads_videos(cfg):
        return
    model._metainfo = SimpleNamespace(results=[SimpleNamespace(task='Image Classification')])
    classes = class_names(cfg, meta).get('classes')
    count = getattr(getattr(model, 'head', None), 'num_classes', None)
    fits = classes and count in (None, len(classes))
    model._dataset_meta = {'classes': list(classes)} if fits else {}
