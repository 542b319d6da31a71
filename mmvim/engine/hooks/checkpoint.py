"""Checkpoints that survive a crash at any moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook

from mmvim.engine import atomic_io
from mmvim.engine.errors import UserError, did_you_mean
from mmvim.registry import HOOKS


class _RemoveLater:
    """A file backend that only remembers what is to be removed."""

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


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's ``CheckpointHook``, safe against a crash or a full disk while it writes.

    - A checkpoint appears under its name only when it is complete.
    - The checkpoints that it replaces (``max_keep_ckpts``, the previous best) are removed after it
      has been written, so that ``last_checkpoint`` always names a complete file. For that moment
      there is one checkpoint more on the disk.
    - A metric that ``save_best`` names and validation does not report is an error that lists the
      metrics that there are.

    The launcher uses it wherever a config says ``CheckpointHook``. Arguments are mmengine's.
    DeepSpeed and ColossalAI write their own directories of shards; for these only the order of
    writing and removing holds.
    """

    def before_run(self, runner) -> None:
        """Make local writes atomic."""
        super().before_run(runner)
        atomic_io.install()

    def before_train(self, runner) -> None:
        """Remove what an interrupted write left behind."""
        super().before_train(runner)
        if is_main_process() and Path(self.out_dir).is_dir():
            for leftover in Path(self.out_dir).glob(f'*.pth.*{atomic_io.TEMPORARY_SUFFIX}'):
                leftover.unlink(missing_ok=True)

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
        with self._removing_afterwards():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        for key in self.key_indicators if self.save_best else ():
            if key != 'auto' and key not in metrics:
                raise UserError(
                    f'default_hooks.checkpoint.save_best is {key!r}, which validation does not '
                    f'report{did_you_mean(key, metrics)}; allowed: {", ".join(sorted(metrics))}'
                )
        with self._removing_afterwards():
            super()._save_best_checkpoint(runner, metrics)
