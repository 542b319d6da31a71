"""Checkpoints that survive a crash at any moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook

from mmvim.engine import atomic_io, random_state
from mmvim.engine.loops import VALIDATED_ITER
from mmvim.errors import UserError, did_you_mean
from mmvim.registry import HOOKS

# Key of the checkpoint.
RANDOM_STATES = 'mmvim_random_states'
# In the message hub: the checkpoint of an interrupted run, in addition to the regular ones.
_INTERRUPTED = 'mmvim_interrupted_ckpt'
# Key of the checkpoint: names of those to remove once it is written.
_SUPERSEDED = 'mmvim_superseded'
# Settings of parameter schedulers, whose state has them, too.
_SCHEDULE = (
    'by_epoch', 'begin', 'end', 'milestones', 'gamma', 'step_size', 'factor', 'start_factor',
    'end_factor', 'total_iters', 'T_max', 'eta_min', 'eta_min_ratio', 'power', 'total_steps',
)  # fmt: skip


class _RemoveLater:
    """A file backend that only records what is to be removed."""

    def __init__(self, backend):
        self._backend = backend
        self.files: list[str] = []
        self.directories: list[str] = []

    def remove(self, filepath):
        self.files.append(filepath)

    def rmtree(self, dir_path):
        self.directories.append(dir_path)

    def __getattr__(self, name):
        return getattr(self._backend, name)


def _has(metrics: dict, prefix: str) -> bool:
    return any(key.startswith(f'{prefix}/') for key in metrics)


def _other_schedules(own: Any, saved: Any) -> list[str]:
    """What the schedulers of a config set otherwise than the states that replace theirs."""
    if isinstance(own, dict) and isinstance(saved, dict):
        return [text for name in own for text in _other_schedules(own[name], saved.get(name))]
    if not isinstance(own, list) or not isinstance(saved, list):
        return []
    changed = [
        f'{type(scheduler).__name__}.{key}={getattr(scheduler, key)} (there {state[key]})'
        for scheduler, state in zip(own, saved, strict=False)
        for key in _SCHEDULE
        if key in state and hasattr(scheduler, key) and getattr(scheduler, key) != state[key]
    ]
    if len(own) != len(saved):
        changed.append(f'{len(own)} schedulers (there {len(saved)})')
    return changed


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's ``CheckpointHook``, safe against a crash or a full disk during a save.

    - A checkpoint gets its name only once it is complete.
    - The checkpoints that it replaces (``max_keep_ckpts``, the previous best) are removed after it
      has been written, so that ``last_checkpoint`` always names a complete file. For that moment
      there is one more checkpoint on disk.
    - The states of all random number generators of every process are saved and restored.
    - A metric without a result for once leaves the best checkpoint as it is.
    - A metric that ``save_best`` names but validation does not report is an error that lists the
      existing metrics.

    The launcher uses it wherever a config says ``CheckpointHook``. Arguments are mmengine's.
    DeepSpeed and ColossalAI write their own directories of shards; for them only the order of
    writing and removing is guaranteed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_iter: int | None = None
        self._states: list[dict] | None = None
        self._resumed_states: list[dict] | None = None
        self._superseded: list[str] = []
        self._meta: dict = {}

    def before_run(self, runner) -> None:
        """Make local writes atomic."""
        super().before_run(runner)
        atomic_io.install()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the random states, which are restored when training begins."""
        if runner._resume:
            self._resumed_states = checkpoint.get(RANDOM_STATES)
            self._superseded = checkpoint.get(_SUPERSEDED, [])
            changed = _other_schedules(runner.param_schedulers, checkpoint.get('param_schedulers'))
            if changed:
                runner.logger.warning(
                    f'Schedules continue as in the checkpoint, not as in the config: '
                    f'{", ".join(changed)}. With load_from instead of --resume they begin anew'
                )

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add the random states, and the position of the checkpoint in the training.

        mmengine's ``FlexibleRunner`` counts one iteration or epoch too many when a checkpoint is
        saved outside ``after_train_iter`` or ``after_train_epoch``.
        """
        checkpoint['meta'].update(self._meta)
        if self._states is not None:
            checkpoint[RANDOM_STATES] = self._states
        if isinstance(self.file_backend, _RemoveLater):
            later = self.file_backend
            names = [Path(path).name for path in (*later.files, *later.directories)]
            checkpoint[_SUPERSEDED] = names

    def before_train(self, runner) -> None:
        """Finish what an interrupted save left undone; restore the random states."""
        super().before_train(runner)
        if runner.param_schedulers is None:
            # There is nothing to save, of which mmengine would warn each time.
            self.save_param_scheduler = False
        self.last_iter = runner.iter if runner._resume else None
        if runner._resume:
            self._follow_moves(runner)
            if is_main_process():
                self._finish_save(runner)
        if is_main_process() and Path(self.out_dir).is_dir():
            for leftover in Path(self.out_dir).glob(f'*.pth.*{atomic_io.TEMPORARY_SUFFIX}'):
                leftover.unlink(missing_ok=True)
        states, self._resumed_states = self._resumed_states, None
        if states is None:
            return
        if len(states) != runner.world_size:
            runner.logger.warning(
                f'The checkpoint was saved by {len(states)} processes and there are '
                f'{runner.world_size} now: the run continues with other random numbers.'
            )
            return
        random_state.restore(states[runner.rank])

    def _follow_moves(self, runner) -> None:
        """Map the best checkpoints to this directory, whatever its name was when they were saved.

        Otherwise a run in a copy of a work directory would remove the best checkpoint of the
        original.
        """

        def here(path: str | None) -> str | None:
            return path and self.file_backend.join_path(self.out_dir, Path(path).name)

        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = here(self.best_ckpt_path)
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[key] = here(path)

    def _finish_save(self, runner) -> None:
        """Remove what the loaded checkpoint replaced, and let ``last_checkpoint`` name it."""
        loaded = str(runner._load_from or '')
        for name in self._superseded:
            path = self.file_backend.join_path(self.out_dir, name)
            if name != Path(loaded).name:
                self._remove(path)
        if loaded and Path(loaded).resolve().parent == Path(self.out_dir).resolve():
            (Path(runner.work_dir) / 'last_checkpoint').write_text(loaded)

    def _remove(self, path: str) -> None:
        if self.file_backend.isdir(path):
            self.file_backend.rmtree(path)
        elif self.file_backend.isfile(path):
            self.file_backend.remove(path)

    def save_now(self, runner, step: int, states: dict | None = None) -> str:
        """Save between two regular checkpoints, as ``iter_STEP.pth``.

        It is removed after the next regular checkpoint has been written. If a regular one of that
        name is due, that one is saved.

        Args:
            runner: The runner.
            step: Number of finished iterations.
            states: The random states of this process to save; its current ones by default.

        Returns:
            The path of the checkpoint.
        """
        if self.last_iter == step and self.last_ckpt is not None:
            return self.last_ckpt
        meta = {'epoch': runner.epoch, 'iter': step}
        if self._is_regular(step):
            with self._saving(meta, states):
                self._save_checkpoint_with_step(runner, step, meta)
            return self.last_ckpt
        name = f'iter_{step}.pth'
        with self._saving(meta, states), self._removing_afterwards():
            self._remove_interrupted(runner)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
            runner.message_hub.update_info(_INTERRUPTED, name)
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=False,
                backend_args=self.backend_args,
                **self.args,
            )
        if is_main_process():
            (Path(runner.work_dir) / 'last_checkpoint').write_text(self.last_ckpt)
        self.last_iter = step
        return self.last_ckpt

    def _is_regular(self, step: int) -> bool:
        if self.by_epoch or self.interval <= 0:
            return False
        return step >= self.save_begin and (step - self.save_begin) % self.interval == 0

    @contextmanager
    def _saving(self, meta: dict, states: dict | None = None) -> Iterator[None]:
        """Collect the random states of all processes, which only the first one writes."""
        before = self._states, self._meta
        if states is not None or self._states is None:
            self._states = all_gather_object(states or random_state.capture())
        self._meta = dict(meta)
        try:
            yield
        finally:
            self._states, self._meta = before

    @contextmanager
    def _removing_afterwards(self) -> Iterator[None]:
        backend = self.file_backend
        if isinstance(backend, _RemoveLater):
            yield
            return
        self.file_backend = later = _RemoveLater(backend)
        try:
            yield
        finally:
            self.file_backend = backend
        # After resuming, a best checkpoint may be written again under the same name.
        written = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
        written.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        for path in later.files:
            if path not in written and backend.isfile(path):
                backend.remove(path)
        for path in later.directories:
            if path not in written and backend.isdir(path):
                backend.rmtree(path)

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        with self._saving(meta), self._removing_afterwards():
            self._remove_interrupted(runner)
            super()._save_checkpoint_with_step(runner, step, meta)
        self.last_iter = meta['iter']

    def _remove_interrupted(self, runner) -> None:
        name = runner.message_hub.runtime_info.get(_INTERRUPTED)
        if name is not None:
            runner.message_hub.pop_info(_INTERRUPTED)
            if is_main_process():
                self._remove(self.file_backend.join_path(self.out_dir, name))

    def after_val_epoch(self, runner, metrics) -> None:
        """Note that validation is done, then save the best checkpoint."""
        runner.message_hub.update_info(VALIDATED_ITER, runner.iter)
        super().after_val_epoch(runner, metrics)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        # A metric without a result for once, such as that of a detector that detects nothing.
        evaluator = getattr(runner.val_loop, 'evaluator', None)
        prefixes = {getattr(metric, 'prefix', None) for metric in getattr(evaluator, 'metrics', ())}
        silent = {prefix for prefix in prefixes if prefix and not _has(metrics, prefix)}
        for key in self.key_indicators if self.save_best else ():
            if silent and (key == 'auto' or key.partition('/')[0] in silent):
                runner.logger.warning(
                    f'The metric {" and ".join(sorted(silent))} has no result this time: no '
                    'checkpoint is saved as the best one'
                )
                return
            if key != 'auto' and key not in metrics:
                raise UserError(
                    f'default_hooks.checkpoint.save_best is {key!r}, which validation does not '
                    f'report{did_you_mean(key, metrics)}; allowed: {", ".join(sorted(metrics))}'
                )
        meta = {'epoch': runner.epoch, 'iter': runner.iter}
        with self._saving(meta), self._removing_afterwards():
            super()._save_best_checkpoint(runner, metrics)
