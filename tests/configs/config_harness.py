"""Run any config for a training and a test step on miniature data.

What is changed is the scale (image sizes, batch, number of workers, iterations) and where data and
weights come from. Everything else is the config's own.
"""

import importlib.util
import math
import numbers
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import own_data
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from PIL import Image

import mmvim

REPO = Path(__file__).parents[2]
CONFIG_ROOT = REPO / 'configs'
BASES = sorted(CONFIG_ROOT.joinpath('_base_').rglob('*.py'))
CONFIGS = sorted(p for p in CONFIG_ROOT.rglob('*.py') if '_base_' not in p.parts)
# Those that carry a published recipe.
FAMILIES = [p for p in CONFIGS if not {'own_data', 'quickstart', 'studies'} & set(p.parts)]

# What makes two configs the same for a miniature run.
_OF_A_KIND = (
    'model', 'train_dataloader', 'test_dataloader', 'optim_wrapper', 'train_cfg', 'custom_hooks',
)  # fmt: skip
_OF_NO_KIND = {'init_cfg', 'accumulative_counts', 'clip_grad'}
# A large stride is one of sliding windows; patches have small ones.
_SIZE_KEYS = {'scale', 'scales', 'crop_size', 'size', 'stride', 'pad_size_divisor'}


def config_id(path: Path) -> str:
    return path.relative_to(CONFIG_ROOT).with_suffix('').as_posix()


def load_script(path: str) -> ModuleType:
    """Import a script that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MiniatureData:
    """Stands for the data folders that configs name; each is generated when it is first wanted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._makers: dict[str, Callable[[Path], object]] = {
            'data/imagenet': self._make('imagenet', 96),
            'data/coco': self._make('coco', 160),
            'data/ade/ADEChallengeData2016': self._make('ade20k', 160),
            'data/quickstart/cls': self._make_quickstart,
            'data/quickstart/det': self._make_quickstart,
            'data/quickstart/seg': self._make_quickstart,
            'data/quickstart/video': self._make_quickstart,
            'data/kinetics400': self._make('kinetics400', 96),
            'data/sthv2': self._make('sthv2', 96),
            'data/breakfast': self._make('breakfast', 96),
            'data/coin': self._make('coin', 96),
            'data/cifar10': self._make_cifar10,
            'data/own_images': own_data.images,
            'data/own_coco': own_data.coco,
            'data/own_voc': own_data.voc,
            'data/BCCD': own_data.blood_cells,
            'data/own_segmentation': own_data.segmentation,
            'data/own_videos': own_data.videos,
            'data/own_frames': own_data.frames,
        }

    def locate(self, path: str) -> str:
        """Translate a path below ``data/`` to the miniature's, and make the miniature.

        Raises:
            KeyError: There is no miniature of this data set.
        """
        for prefix, make in self._makers.items():
            if path == prefix or path.startswith(f'{prefix}/'):
                if not (self.root / prefix).exists():
                    make(self.root / prefix)
                return str(self.root / path) + ('/' if path.endswith('/') else '')
        raise KeyError(f'no miniature data set for {path!r}: add one to {__file__}')

    @staticmethod
    def _make(name: str, long_side: int) -> Callable[[Path], object]:
        def make(root: Path) -> None:
            write, _ = load_script('tools/misc/make_miniature_data.py').DATASETS[name]
            write(root, train_images=4, val_images=2, long_side=long_side)

        return make

    @staticmethod
    def _make_cifar10(root: Path) -> None:
        classes = Config.fromfile(CONFIG_ROOT / 'studies/discretization/vim_cifar10.py').classes
        generator = np.random.default_rng(0)
        for split in ('train', 'test'):
            for name in classes:
                path = root / split / name / '0001.png'
                path.parent.mkdir(parents=True)
                image = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(image).save(path)

    @staticmethod
    def _make_quickstart(root: Path) -> None:
        from mmvim.datasets import quickstart

        quickstart.prepare(root.name, root.parent, sizes=dict(train=4, val=2, test=2))


def shrink(cfg: Config, data: MiniatureData, work_dir: Path, shallow: bool = True) -> Config:
    """Return ``cfg`` at a scale that takes seconds, on miniature data.

    Args:
        cfg: Any config of the three task libraries.
        data: Where data comes from.
        work_dir: Where the run writes to.
        shallow: Whether to cut the backbone to as few layers as its outputs need.
    """
    cfg = Config(_map(cfg.to_dict(), data))
    cfg.work_dir = str(work_dir)
    cfg.load_from = None
    cfg.launcher = 'none'
    cfg.log_level = 'WARNING'
    cfg.default_hooks.checkpoint.save_optimizer = False
    # Visualizers are kept by name for the life of the process, folder included, and best scores by
    # the name of the experiment, which is the second in which it starts unless it has another.
    cfg.visualizer.name = cfg.experiment_name = uuid.uuid4().hex
    for name in ('train', 'val', 'test'):
        loader = cfg[f'{name}_dataloader']
        loader.update(
            batch_size=2 if name == 'train' else 1,
            num_workers=0,
            persistent_workers=False,
            pin_memory=False,
        )
        dataset = loader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        dataset.indices = 2
    loop = cfg.train_cfg
    length = 'max_iters' if 'max_iters' in loop else 'max_epochs'
    for scheduler in cfg.param_scheduler:
        scheduler.setdefault('end', loop[length])
    loop.pop('dynamic_intervals', None)
    loop.pop('val_begin', None)
    loop.update({length: 1, 'val_interval': 1})
    large = cfg.model.backbone.get('arch') == 'large3'  # 740 million parameters take 15 GB to train
    if shallow:
        cut_depth(cfg.model)
    elif large:
        cut_width(cfg.model)
    return cfg


def kinds(paths: list[Path]) -> list:
    """Parameters for pytest: of configs that differ only in numbers and files all but one are slow.

    A run of one says that the others run: the longer clips and larger frames of a recipe are
    shrunk to the same size.
    """
    seen: set[str] = set()
    parameters = []
    for path in paths:
        cfg = Config.fromfile(path).to_dict()
        kind = repr([_kind(cfg.get(key)) for key in _OF_A_KIND])
        known = kind in seen
        seen.add(kind)
        parameters.append(
            pytest.param(path, id=config_id(path), marks=[pytest.mark.slow] if known else [])
        )
    return parameters


def _kind(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _kind(v) for k, v in sorted(node.items()) if k not in _OF_NO_KIND}
    if isinstance(node, list | tuple):
        return [_kind(v) for v in node]
    if isinstance(node, numbers.Real) and not isinstance(node, bool):
        return 'number'
    return node


def _map(node: Any, data: MiniatureData, key: str = '') -> Any:
    """Copy a config tree with small sizes, miniature paths and random weights."""
    if isinstance(node, dict):
        if key == 'init_cfg' and node.get('type') == 'Pretrained':
            return None
        return {k: _map(v, data, k) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_map(v, data, key) for v in node)
    if isinstance(node, str) and node.startswith('data/'):
        return data.locate(node)
    if key == 'num_frames' and isinstance(node, int):
        return min(node, 4)
    if key in _SIZE_KEYS and isinstance(node, int) and node > 128:
        return max(64, math.ceil(node / 8 / 16) * 16)
    if key == 'window_sizes' and isinstance(node, int):
        return math.ceil(node / 8)
    # An untrained detector is sure of nothing: without these limits it has no detections to
    # evaluate, or hundreds of thousands. And heads take most of the time of a run.
    limits = dict(
        score_thr=0.0, nms_pre=100, max_per_img=10, num=16,
        fc_out_channels=64, conv_out_channels=16, channels=16,
    )  # fmt: skip
    if key in limits and isinstance(node, int | float):
        return min(node, limits[key])
    return node


def cut_depth(model: ConfigDict) -> None:
    """Cut a backbone, and the teacher of one, to as few layers as its outputs need."""
    if 'teacher' in model:
        cut_depth(ConfigDict(backbone=model.teacher))
    backbone = model.backbone
    if not isinstance(backbone.get('arch'), str):
        return
    if backbone.type in ('mmvim.MambaVision', 'MambaVision'):
        zoo = mmvim.MambaVision.arch_zoo[backbone.arch]
        backbone.arch = dict(zoo, depths=(1, 1, 2, 2), mlp_ratio=1)
        cut_width(model)
    if backbone.type in ('mmvim.VMamba', 'VMamba'):
        backbone.arch = dict(mmvim.VMamba.arch_zoo[backbone.arch], depths=(1, 1, 1, 1))
    if backbone.type.rpartition('.')[2] in ('Vim', 'VideoMamba'):
        outputs = backbone.get('out_indices', -1)
        outputs = 1 if isinstance(outputs, int) else len(outputs)
        kind = getattr(mmvim, backbone.type.rpartition('.')[2])
        width = kind.arch_zoo[backbone.arch]['embed_dims']
        backbone.arch = dict(embed_dims=width, depth=max(2, outputs))
        backbone.out_indices = tuple(range(-outputs, 0))


def cut_width(model: ConfigDict) -> None:
    """Narrow the MambaVision of a classifier or segmentor, of whose layers few have its width."""
    widths = [32 * 2**i for i in range(4)]
    if 'decode_head' in model:
        model.decode_head.in_channels, model.auxiliary_head.in_channels = widths, widths[2]
    elif 'in_channels' in model.get('head', ()):
        model.head.in_channels = widths[3]
    else:
        return
    arch = model.backbone.arch
    arch = dict(mmvim.MambaVision.arch_zoo[arch] if isinstance(arch, str) else arch)
    model.backbone.arch = dict(arch, embed_dims=widths[0], num_heads=(4, 8))


def run(cfg: Config) -> dict[str, float]:
    """Train and test; return the test's metrics.

    Checks that the loss is finite and that every parameter takes part in it, as distributed
    training without ``find_unused_parameters`` needs.
    """
    # Formatting the config for the log would take a third of the time.
    with mock.patch('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, False)):
        return _run(cfg)


def _run(cfg: Config) -> dict[str, float]:
    runner = Runner.from_cfg(cfg)
    untouched = set()
    for name, parameter in runner.model.named_parameters():
        if parameter.requires_grad:
            untouched.add(name)
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: untouched.discard(name)
            )
    runner.train()
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) >= 1
    assert all(math.isfinite(loss) for loss in losses), losses
    assert not untouched, f'parameters without gradient: {sorted(untouched)}'
    metrics = runner.test()
    assert metrics
    values = [value for value in metrics.values() if isinstance(value, numbers.Real)]
    assert values
    assert all(math.isfinite(value) for value in values), metrics
    return metrics


def build_model(cfg: Config) -> torch.nn.Module:
    """Build the model as ``Runner`` does, at its full size."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.default_scope)
    importlib.import_module(f'{cfg.default_scope}.models')
    model = cfg.model.copy()
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(model)
