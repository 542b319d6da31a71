"""The checkpoint that a run continues from."""

from typing import Any

import torch
from mmengine.config import Config

from mmvim.checkpoints.training import (
    BrokenCheckpoint,
    Checkpoint,
    candidates,
    inspect,
    newest_first,
)
from mmvim.errors import UserError


def use(cfg: Config, checkpoint: Checkpoint) -> None:
    """Make a run continue from ``checkpoint``, with the checkpoint's seed."""
    cfg.resume, cfg.load_from = True, checkpoint.path
    if checkpoint.seed is not None:
        randomness = cfg.get('randomness') or {}
        cfg.randomness = dict(randomness, seed=checkpoint.seed)


def resume_last(cfg: Config, notes: list[str], warnings: list[str]) -> list[str]:
    """Make a run continue from the newest complete checkpoint of its work directory.

    Without any checkpoint the run starts from the beginning.

    Args:
        cfg: The config, changed in place.
        notes: Receives a line if the run starts from the beginning.
        warnings: Receives a line for each checkpoint that is skipped.

    Returns:
        The checkpoints to try if the chosen one turns out to belong to another model.

    Raises:
        UserError: There are checkpoints, but none that training can continue from.
    """
    paths = candidates(cfg.work_dir)
    if not paths:
        notes.append(f'No checkpoint in {cfg.work_dir} to resume: starting from the beginning.')
        return []
    chosen = next(newest_first(paths, warnings), None)
    if chosen is None:
        raise UserError(
            f'--resume: none of the checkpoints in {cfg.work_dir!r} can be continued from: '
            f'{" ".join(warnings)} Move them away to start over'
        )
    use(cfg, chosen)
    return paths[paths.index(chosen.path) + 1 :]


def resume_path(cfg: Config, path: str) -> None:
    """Make a run continue from the checkpoint that the user named.

    Reading it and reporting errors is left to the runner; only the seed is needed earlier.
    """
    cfg.resume, cfg.load_from = True, path
    try:
        use(cfg, inspect(path, whole=False))
    except BrokenCheckpoint:
        return


def leave_out_foreign(runner: Any, rest: list[str]) -> None:
    """Choose an older checkpoint if the chosen one does not belong to the runner's model.

    Args:
        runner: A runner that already has its model.
        rest: Older checkpoints, newest first.

    Raises:
        UserError: All belong to another model.
    """
    path = runner._load_from
    if not runner._resume or not isinstance(runner.model, torch.nn.Module) or not path:
        return
    model = getattr(runner.model, 'module', runner.model)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    notes: list[str] = []
    chosen = inspect(path, whole=False)
    older = newest_first(rest, notes)
    while chosen is not None and (misfit := _misfit(chosen, shapes)):
        notes.append(f'The checkpoint {chosen.path!r} is left out: {misfit}.')
        chosen = next(older, None)
    for note in notes:
        runner.logger.warning(note)
    if chosen is None:
        raise UserError(
            f'--resume: no checkpoint in {runner.work_dir!r} is of this model: {" ".join(notes)}'
        )
    if chosen.path != path:
        runner._load_from = chosen.path
        if chosen.seed is not None:
            runner._randomness_cfg.update(seed=chosen.seed)
            runner.set_randomness(**runner._randomness_cfg)


def _misfit(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> str | None:
    if not checkpoint.shapes:
        return None
    theirs = {name.removeprefix('module.'): shape for name, shape in checkpoint.shapes.items()}
    for name, shape in shapes.items():
        if name not in theirs:
            return f'it is of another model, it lacks {name}'
        if theirs[name] != shape:
            return f'it is of another model, {name} has shape {theirs[name]} in it, not {shape}'
    return None
