"""Hooks for configs of the distributed tests, which import this module by ``custom_imports``."""

import os
import time
from pathlib import Path

import torch
from mmengine.dist import get_rank, get_world_size, is_distributed
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

# Batches of 4 and of 8 are compared.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False


@HOOKS.register_module(force=True)
class RecordWeights(Hook):
    """Write the weights after each iteration, of each process, to ``weights_RANK.pth``."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.seen = [self._weights(runner)]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(self._weights(runner))

    def after_train(self, runner):
        torch.save(self.seen, f'weights_{get_rank()}.pth')

    @staticmethod
    def _weights(runner):
        model = runner.model
        if 'FullySharded' in type(model).__name__:
            with type(model).summon_full_params(model):
                return {
                    name.replace('_fsdp_wrapped_module.', ''): value.detach().cpu().clone()
                    for name, value in model.module.named_parameters()
                }
        model = getattr(model, 'module', model)
        return {k: v.detach().float().cpu().clone() for k, v in model.named_parameters()}


@HOOKS.register_module(force=True)
class Die(Hook):
    """Let one process die in the middle of training.

    Args:
        rank: Which one; -1 is the last.
        how: ``'kill'`` (no cleaning up), ``'raise'`` or ``'exit'`` (with code 3).
        at: Iteration.
    """

    def __init__(self, rank: int = 1, how: str = 'kill', at: int = 2):
        self.rank, self.how, self.at = rank, how, at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        rank = self.rank % get_world_size()
        if is_distributed() and get_rank() == rank and runner.iter == self.at:
            with open('died', 'w') as file:
                file.write(str(time.time()))
            if self.how == 'kill':
                os.kill(os.getpid(), 9)
            if self.how == 'exit':
                os._exit(3)
            raise RuntimeError('this process was told to fail')


@HOOKS.register_module(force=True)
class Pause(Hook):
    """Take time, and say in the file ``iterations`` how far the first process is."""

    def __init__(self, seconds: float = 0.5):
        self.seconds = seconds

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 0:
            with open('iterations', 'a') as file:
                file.write(f'{runner.iter}\n')
        time.sleep(self.seconds)


@HOOKS.register_module(force=True)
class SlowSave(Hook):
    """Take time to save, and write into ``seen_RANK`` which checkpoint is there at the end."""

    def before_save_checkpoint(self, runner, checkpoint):
        time.sleep(2)

    def after_run(self, runner):
        names = sorted(path.name for path in Path(runner.work_dir).glob('*.pth'))
        Path(f'seen_{get_rank()}').write_text(' '.join(names))
