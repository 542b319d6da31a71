"""The tables of every recipe's settings, ``configs/**/recipes.yml``, and what differs from them."""

import copy
import math
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from config_harness import CONFIG_ROOT
from mmengine.config import Config

# What runners and tools read of a config; everything else in it is a variable.
READ = (
    'default_scope', 'model', 'data_preprocessor', 'train_dataloader', 'val_dataloader',
    'test_dataloader', 'train_cfg', 'val_cfg', 'test_cfg', 'val_evaluator', 'test_evaluator',
    'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'default_hooks', 'custom_hooks', 'env_cfg',
    'visualizer', 'log_processor', 'log_level', 'load_from', 'resume', 'randomness', 'tta_model',
    'tta_pipeline', 'custom_imports', 'runner_type', 'strategy', 'launcher', 'compile',
    'model_wrapper_cfg', 'activation_checkpointing', 'find_unused_parameters',
)  # fmt: skip
ABSENT = 'absent'


@cache
def table(folder: str) -> list[dict]:
    """The entries of a family, or, in ``_base_``, those for all."""
    return yaml.safe_load((CONFIG_ROOT / folder / 'recipes.yml').read_text())


def fits(entry: dict, path: Path) -> bool:
    return any(fnmatch(path.stem, pattern) for pattern in entry['recipes'])


def expected(path: Path) -> dict:
    """A recipe's entries in the tables; of two for one setting the later one counts."""
    settings: dict = {}
    for entry in [*table('_base_'), *table(path.parent.name)]:
        if fits(entry, path):
            if 'same_as' in entry:
                packaged = plain(Config.fromfile(packaged_config(entry['same_as']))._cfg_dict)
                for key in entry['keys']:
                    merge(settings, nested(key, packaged))
            merge(settings, values(entry.get('settings', {})))
    return settings


def packaged_config(name: str) -> Path:
    """The file of ``mmdet::…`` or ``mmseg::…``."""
    import importlib

    library, _, file = name.partition('::')
    return Path(importlib.import_module(library).__file__).parent / '.mim/configs' / file


def nested(key: str, tree: dict) -> dict:
    """The part of ``tree`` at ``a.b.c``, with the keys that lead there."""
    first, _, rest = key.partition('.')
    return {first: nested(rest, tree[first]) if rest else tree[first]}


def merge(settings: Any, more: dict) -> None:
    """Add ``more``: mappings are merged, also into the items of a list, lists are replaced."""
    for key, value in more.items():
        old = settings[key] if isinstance(settings, list) else settings.get(key)
        if value == ABSENT:
            settings.pop(key, None)
        elif isinstance(value, dict) and isinstance(old, dict | list):
            merge(old, value)
        else:
            settings[key] = copy.deepcopy(value)


def values(node: Any) -> Any:
    """The values of a table, in which ``= 1 / 3`` is a number."""
    if isinstance(node, dict):
        return {key: values(value) for key, value in node.items()}
    if isinstance(node, list):
        return [values(value) for value in node]
    if isinstance(node, str) and node.startswith('= '):
        return eval(node[2:], {'__builtins__': {}})
    return node


def plain(node: Any) -> Any:
    """A config without mmengine's classes and tuples."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node


def actual(path: Path) -> dict:
    cfg = plain(Config.fromfile(path)._cfg_dict)
    return {key: cfg[key] for key in READ if key in cfg}


def differences(found: Any, wanted: Any, where: str = '') -> list[str]:
    """One line for each setting that is not what the table says."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in [*found, *(key for key in wanted if key not in found)]
            for line in differences(
                found.get(key, ABSENT), wanted.get(key, ABSENT), f'{where}.{key}' if where else key
            )
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [
            line
            for i, pair in enumerate(zip(found, wanted, strict=True))
            for line in differences(*pair, f'{where}.{i}')
        ]
    numbers = all(type(value) in (int, float) for value in (found, wanted))
    if numbers and math.isclose(found, wanted, rel_tol=1e-9):
        return []
    same = type(found) is type(wanted) and found == wanted
    return [] if same else [f'{where} is {found!r}, not {wanted!r}']
