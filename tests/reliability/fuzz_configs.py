"""Every leaf of every shipped config, changed once.

A changed config is checked and built as the launcher does it, at the scale of the miniature data.
What is wrong with it must be said in one line that names the key, or, where the error may be a bug,
in a note below the traceback.
"""

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / 'configs'))

CHANGES = ('type', 'name', 'none', 'negative', 'removed', 'added')
_data = None
_configs: dict[str, Any] = {}


def prepare() -> None:
    """Import what the configs need, and make the miniature data."""
    global _data
    import mmvim.apis.inferencers.common  # noqa: F401, I001  # before what it makes importable
    import mmseg.models  # noqa: F401
    import torch
    from config_harness import MiniatureData
    from mmengine.dataset import BaseDataset
    from mmengine.model import BaseModel
    from mmengine.registry import DATASETS, MODELS

    from mmvim.cli import diagnosis, samples

    torch.set_num_threads(1)
    samples.install()
    diagnosis.install()

    @MODELS.register_module()
    class OneWeight(BaseModel):
        """Stands for the model where the config of the model is not what is tried."""

        def __init__(self, data_preprocessor: Any = None) -> None:
            super().__init__()
            self.weight = torch.nn.Linear(1, 1)

        def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'loss') -> dict:
            return {'loss': self.weight.weight.sum()}

    @DATASETS.register_module()
    class TwoNumbers(BaseDataset):
        """Stands for the data where they are not what is tried."""

        def load_data_list(self) -> list[dict]:
            return [{'number': i} for i in range(2)]

    shared = os.environ.get('MMVIM_FUZZ_DATA')
    _data = MiniatureData(Path(shared) if shared else Path('data').resolve())
    for module in ('yapf', 'yapf.yapflib.yapf_api'):
        __import__(module)
    import yapf.yapflib.yapf_api as yapf_api

    # Formatting the config for the log takes longer than all the rest.
    yapf_api.FormatCode = lambda text, **_: (text, False)


def shipped(name: str) -> Any:
    """A config at miniature scale, its model as narrow as its layers allow."""
    from config_harness import CONFIG_ROOT, shrink
    from mmengine.config import Config

    if name not in _configs:
        cfg = Config.fromfile(CONFIG_ROOT / name)
        cfg = shrink(cfg, _data, Path('work').resolve())
        backbone = cfg.model.backbone
        if isinstance(backbone.get('arch'), dict) and 'embed_dims' in backbone.arch:
            backbone.arch.embed_dims = 16 if 'depth' in backbone.arch else 32
        _configs[name] = cfg
    return copy.deepcopy(_configs[name])


def leaves(node: Any, path: tuple = (), types: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """The path of each leaf, with what tells equal ones of different configs from others."""
    if isinstance(node, dict):
        types = (*types, str(node.get('type')))
        items = node.items()
    elif isinstance(node, list | tuple) and node and isinstance(node[0], dict):
        items = enumerate(node)
    else:
        yield path, repr((path, types, node))
        return
    for key, value in items:
        yield from leaves(value, (*path, key), types)


def change(cfg: Any, path: tuple, kind: str) -> bool:
    """Change a leaf; False if this change does not exist for it."""
    if kind == 'unchanged':
        return True
    *above, key = path
    owner = cfg
    for part in above:
        owner = owner[part]
    if kind in ('removed', 'added') and not isinstance(owner, dict):
        return False
    value = owner[key]
    if kind == 'removed':
        del owner[key]
        return True
    if kind == 'added':
        owner[f'{key}_x'] = value
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == 'negative':
        if not number:
            return False
        owner[key] = -value if value else -1
    elif kind == 'none':
        if value is None:
            return False
        owner[key] = None
    elif kind == 'name':
        owner[key] = 'NoSuchName'
        return value != owner[key]
    elif isinstance(value, str):
        owner[key] = [7]
    elif isinstance(value, list | tuple):
        owner[key] = {'a': 7}
    else:
        owner[key] = ['x']
    return True


def run(case: dict) -> tuple[str, Any]:
    """List the leaves of a config, or build one with a changed leaf."""
    if 'change' not in case:
        from mmvim.cli.config_keys import RUNNER_KEYS

        return 'ok', [
            (path, same)
            for path, same in leaves(shipped(case['config']).to_dict())
            # The launcher, not the config, says where a run writes to; and a config has variables.
            if path[0] in RUNNER_KEYS and path[0] not in ('work_dir', 'launcher')
        ]
    from mmengine.config import Config

    tree = shipped(case['config']).to_dict()
    if not change(tree, case['path'], case['change']):
        return 'ok', 'no such change'
    folder = tempfile.mkdtemp(dir='.')
    tree['work_dir'] = folder
    try:
        cfg = Config(tree)
    except (KeyError, TypeError) as error:
        raise AssertionError(f'not a config: {error}') from error
    try:
        build(cfg, str(case['path'][0]))
    except Exception as error:
        return _judge(error, cfg, case)
    finally:
        _forget()
        shutil.rmtree(folder)
    return 'ok', ''


def build(cfg: Any, top: str) -> None:
    """Do what the launcher does with the part of the config that begins with the key ``top``."""
    from mmengine.registry import HOOKS, DefaultScope
    from mmengine.runner import Runner

    from mmvim.apis.model_zoo import build_model
    from mmvim.cli import checks
    from mmvim.engine.hooks import CheckpointHook

    checks.check_config(cfg, ('train', 'val'))
    checks.check_config(cfg, ('test',))
    checks.check_pretrained(cfg)
    scope = cfg.get('default_scope') or 'mmengine'
    if top in ('model', 'data_preprocessor'):
        build_model(cfg)
        return
    if top.endswith('_dataloader'):
        with DefaultScope.overwrite_default_scope(scope):
            loader = Runner.build_dataloader(cfg[top], seed=0)
            next(iter(loader))
        return
    if top != 'optim_wrapper':
        cfg.model = dict(type='mmengine.OneWeight')
        for name in ('constructor', 'paramwise_cfg'):
            cfg.optim_wrapper.pop(name, None)
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(key) is not None:
            cfg[key].dataset = dict(type='mmengine.TwoNumbers', serialize_data=False)
    HOOKS.register_module(name='CheckpointHook', module=CheckpointHook, force=True)
    runner = Runner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    runner._test_loop = runner.build_test_loop(runner._test_loop)
    runner.call_hook('before_run')


def _judge(error: Exception, cfg: Any, case: dict) -> tuple[str, str]:
    from mmvim.cli.diagnosis import explain, whereabouts

    path = [str(part) for part in case['path']]
    line = explain(error, cfg)
    kind = 'refused'
    if line is None:
        line, kind = whereabouts(error, cfg), 'noted'
        if line is None:
            raise error
    # The leaf, what it belongs to, or a file that is not there.
    named = any('.'.join(part) in line for part in (path[-1:], path[:-1], path[:1]) if part)
    named = named or 'does not exist' in line or 'No such file' in line or 'cannot load' in line
    if not named:
        raise AssertionError(f'the message does not name {".".join(path)}: {line}') from error
    return kind, line


def _forget() -> None:
    """Close the logs of a runner, and let nothing find it by its name."""
    import logging

    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer

    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.close()
                logger.removeHandler(handler)
    kinds = [Visualizer]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()
    for kind in (MMLogger, MessageHub, DefaultScope):
        kind._instance_dict.clear()
