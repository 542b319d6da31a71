"""Whether the weights that a run loads fit its model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import runner as mmengine_runner
from torch import nn

from mmvim.errors import CheckpointError

_MISFIT = 'The model and loaded state dict do not match exactly'


@contextmanager
def checked_loading(runner: Any, complete: bool) -> Iterator[None]:
    """Refuse checkpoints of another model while ``runner`` runs.

    mmengine loads with ``strict=False`` and only logs what does not fit. Here no load may leave the
    model without a single weight of the checkpoint, and a load that must be complete may leave no
    parameter out. Buffers, and keys that the model does not know, are still only logged.

    Args:
        runner: A ``Runner`` or ``FlexibleRunner``.
        complete: Whether ``load_from`` must give every parameter of the model (testing, resuming),
            or may give a part (fine-tuning). Checkpoints of ``init_cfg`` may always give a part.
    """
    lenient = mmengine_checkpoint.load_state_dict
    load_or_resume = runner.load_or_resume
    must_be_complete = False

    def checked(module: nn.Module, state_dict: dict, strict: bool = False, logger=None) -> None:
        try:
            lenient(module, state_dict, strict=True, logger=logger)
        except RuntimeError as error:
            if strict or not str(error).startswith(_MISFIT):
                raise
            _judge(module, str(error), must_be_complete, state_dict)
            print_log(str(error), logger='current', level=30)

    def flagged() -> None:
        nonlocal must_be_complete
        must_be_complete = complete
        try:
            load_or_resume()
        finally:
            must_be_complete = False

    load_checkpoint = mmengine_runner._load_checkpoint

    def with_state_dict(*args: Any, **kwargs: Any) -> dict:
        return _as_mmengine_writes(load_checkpoint(*args, **kwargs))

    mmengine_checkpoint.load_state_dict = checked
    mmengine_runner._load_checkpoint = with_state_dict
    runner.load_or_resume = flagged
    try:
        yield
    finally:
        mmengine_checkpoint.load_state_dict = lenient
        mmengine_runner._load_checkpoint = load_checkpoint
        del runner.load_or_resume


def _as_mmengine_writes(checkpoint: Any) -> Any:
    """Put the weights of official files under ``state_dict``, where mmengine's hooks look for them.

    Official files hold them under ``model``, or are nothing but the weights.
    """
    if not isinstance(checkpoint, dict) or 'state_dict' in checkpoint:
        return checkpoint
    if isinstance(checkpoint.get('model'), dict):
        rest = {key: value for key, value in checkpoint.items() if key != 'model'}
        return {'state_dict': checkpoint['model'], **rest}
    return {'state_dict': checkpoint}


def _judge(module: nn.Module, report: str, complete: bool, state_dict: dict) -> None:
    while is_model_wrapper(module) or isinstance(module, BaseTTAModel):
        module = module.module
    names = {name for name, _ in module.named_parameters()}
    missing = names & set(_listed(r'missing keys in source state_dict: (.*)', report))
    sizes = re.findall(r'size mismatch for (\S+): .*?shape (.*?) from.*?is (.*?)\.(?:\s|$)', report)
    mismatched = names & {name for name, _, _ in sizes}
    if names and names == missing | mismatched:
        if sizes:
            raise CheckpointError(f'is of another model: {_sizes(sizes)}')
        raise CheckpointError(
            'is of another model: none of its weights fits; it has '
            f'{_some(state_dict)}, the model {_some(names)}'
        )
    if not complete:
        return
    if mismatched:
        raise CheckpointError(f'is of another model: {_sizes(sizes)}')
    if missing:
        raise CheckpointError(
            f'is of another model: it lacks {len(missing)} of {len(names)} parameters: '
            f'{_some(missing)}'
        )


def _listed(pattern: str, report: str) -> list[str]:
    found = re.search(pattern, report)
    return found[1].split(', ') if found else []


def _sizes(sizes: list[tuple[str, str, str]]) -> str:
    name, theirs, ours = sizes[0]
    theirs, ours = (text.replace('torch.Size(', '').rstrip(')') for text in (theirs, ours))
    more = f' (and {len(sizes) - 1} more)' if len(sizes) > 1 else ''
    return f'{name} has shape {theirs} in it and {ours} in the model{more}'


def _some(names: Any) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (', …' if len(names) > 3 else '')
