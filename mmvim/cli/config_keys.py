"""The config keys that a runner reads."""

from collections.abc import Iterator
from typing import Any

# The keys that Runner and FlexibleRunner read, and their types.
RUNNER_KEYS: dict[str, tuple[type, ...]] = {
    'model': (dict,),
    'train_dataloader': (dict,),
    'val_dataloader': (dict,),
    'test_dataloader': (dict,),
    'train_cfg': (dict,),
    'val_cfg': (dict,),
    'test_cfg': (dict,),
    'auto_scale_lr': (dict,),
    'optim_wrapper': (dict,),
    'param_scheduler': (dict, list, tuple),
    'val_evaluator': (dict, list, tuple),
    'test_evaluator': (dict, list, tuple),
    'default_hooks': (dict,),
    'custom_hooks': (list, tuple),
    'data_preprocessor': (dict,),
    'load_from': (str,),
    'resume': (bool, str),
    'work_dir': (str,),
    'launcher': (str,),
    'env_cfg': (dict,),
    'log_processor': (dict,),
    'log_level': (str, int),
    'visualizer': (dict,),
    'default_scope': (str,),
    'randomness': (dict,),
    'experiment_name': (str,),
    'runner_type': (str, type),
    'strategy': (dict,),
    'model_wrapper_cfg': (dict,),
    'activation_checkpointing': (str, list, tuple),
    'efficient_conv_bn_eval': (str, list, tuple),
    'compile': (bool, dict),
    'graph': (bool, dict),
    'sync_bn': (str,),
    'find_unused_parameters': (bool,),
    'custom_imports': (dict,),
    'tta_model': (dict,),
    'tta_pipeline': (list, tuple),
}


def walk_dicts(node: Any, path: str = '') -> Iterator[tuple[str, dict]]:
    """Yield every dict inside ``node``, itself included, with its key path."""
    if isinstance(node, dict):
        yield path, node
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    elif hasattr(node, 'items'):
        items = node.items()
    else:
        return
    for key, value in items:
        yield from walk_dicts(value, f'{path}.{key}' if path else str(key))
