"""Trainings that can be killed, hundreds of them: forked from a process that has imported all.

``python runs.py`` reads commands from its standard input, one JSON object a line: ``{"argv": …,
"cwd": …, "log": …, "env": …, "fault": …}`` forks a training and answers with its process id,
``{"wait": PID}`` answers with its exit code (negative for a signal), ``"stop"`` ends it. A training
that does not end within ``LIMIT`` seconds of waiting is aborted, with its stacks in its log: one
that hangs must not hold up the tests after it.
"""

import contextlib
import faulthandler
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

LIMIT = 240

CONFIG = """
default_scope = 'mmpretrain'
classes = ('a', 'b', 'c')
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(
        type='mmvim.Vim', arch=dict(embed_dims=16, depth=2, d_state=4), img_size=16, patch_size=8,
        drop_path_rate=0.2),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16,
              loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
dataset = dict(type='CustomDataset', data_root={data!r}, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={workers} > 0,
    sampler=dict(type={sampler!r}, shuffle=True),
    dataset=dict(data_prefix='train', **dataset, pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='RandomFlip', prob=0.5),
        dict(type='ColorJitter', brightness=0.4, contrast=0.4),
        dict(type='RandomErasing', erase_prob=0.5, mode='rand'),
        dict(type='PackInputs')]))
val_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix='train', **dataset,
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader, test_evaluator = val_dataloader, val_evaluator
train_cfg = {loop}
val_cfg, test_cfg = dict(), dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=7),
    dict(type='CosineAnnealingLR', by_epoch={by_epoch}, begin={begin}, end={end})]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=4),
    checkpoint=dict(type='CheckpointHook', max_keep_ckpts=2, save_best='accuracy/top1',
                    rule='greater', **{checkpoint}),
    visualization=dict(type='VisualizationHook', enable=False))
custom_hooks = [dict(type='EMAHook', momentum=0.1, update_buffers=True),
                dict(type='RecordBatches', pause={pause})]
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed={seed})
"""

VARIANTS = {
    'epochs': dict(
        workers=2,
        sampler='DefaultSampler',
        loop=dict(by_epoch=True, max_epochs=4, val_interval=1),
        by_epoch=True,
        begin=1,
        end=4,
        checkpoint=dict(interval=1),
    ),
    'epochs, saved by iteration': dict(
        workers=0,
        sampler='DefaultSampler',
        loop=dict(by_epoch=True, max_epochs=4, val_interval=1),
        by_epoch=False,
        begin=7,
        end=24,
        checkpoint=dict(interval=4, by_epoch=False),
    ),
    'iterations': dict(
        workers=2,
        sampler='InfiniteSampler',
        loop=dict(by_epoch=False, max_iters=24, val_interval=8),
        by_epoch=False,
        begin=7,
        end=24,
        checkpoint=dict(interval=4, by_epoch=False),
    ),
}


def write_images(root: Path, n: int = 24) -> None:
    """Write ``n`` noisy images of three classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        name = 'abc'[i % 3]
        (root / 'train' / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 96, (16, 16, 3)) + 60 * (i % 3)
        Image.fromarray(pixels.astype('uint8')).save(root / 'train' / name / f'{i}.png')


def write_config(path: Path, data: Path, variant: str, pause: float = 0.0, seed: int | None = 0):
    """Write the config of a variant."""
    path.write_text(CONFIG.format(data=str(data), pause=pause, seed=seed, **VARIANTS[variant]))


class Runs:
    """The other end: starts trainings in a ``runs.py`` process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                'OMP_NUM_THREADS': '1',
                # Asking CUDA itself whether there is a GPU would keep the children from using it.
                'PYTORCH_NVML_BASED_CUDA_CHECK': '1',
                # Without it cuBLAS is not deterministic, and torch says so where it must be.
                'CUBLAS_WORKSPACE_CONFIG': ':4096:8',
            },
        )

    def start(
        self, cwd: Path, *argv: str, fault: dict | None = None, env: dict | None = None
    ) -> int:
        """Start ``tools/train.py ARGV`` in ``cwd``; its output is added to ``cwd/log``."""
        return self._ask({'argv': argv, 'cwd': str(cwd), 'fault': fault, 'env': env or {}})

    def wait(self, pid: int) -> int:
        """Return the exit code, or minus the signal."""
        return self._ask({'wait': pid})

    def close(self) -> None:
        # Closing the pipe would not do: workers that were forked meanwhile hold it open as well.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write('"stop"\n')
            self._process.stdin.close()
        self._process.wait(120)

    def _ask(self, command: dict) -> int:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + '\n')
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait(60)
            raise RuntimeError(f'runs.py ended with exit code {code}; its error is on stderr')
        return int(answer)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def install_fault(fault: dict) -> None:
    """Let the ``nth`` checkpoint that this process writes be its last.

    ``at`` is ``write`` (after ``fraction`` of the bytes), ``before rename``, ``after rename``,
    ``pointer`` (``last_checkpoint`` is opened, but not written), ``remove`` (before an old
    checkpoint is removed), ``full`` (as ``write``, but the disk is full) or ``limit`` (the process
    may write no files larger than ``fraction`` of a checkpoint).
    """
    import builtins
    import resource

    from mmengine.hooks import checkpoint_hook

    from mmvim.engine import atomic_io

    at, left = fault['at'], [fault.get('nth', 1)]
    replace = os.replace

    def is_due(name: str) -> bool:
        if '.pth' not in str(name):
            return False
        left[0] -= 1
        return left[0] == 0

    class File:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content: bytes) -> int:
            self._file.write(content[: int(fault['fraction'] * len(content))])
            self._file.flush()
            if at == 'full':
                raise OSError(28, 'No space left on device')
            return die()

    def faulty_open(name, mode='r', *args, **kwargs):
        file = builtins.open(name, mode, *args, **kwargs)  # noqa: SIM115
        return File(file) if is_due(name) else file

    def faulty_replace(source, target):
        if not is_due(target):
            return replace(source, target)
        if at == 'after rename':
            replace(source, target)
        return die()

    def faulty_pointer(name, mode='r', *args, **kwargs):
        file = builtins.open(name, mode, *args, **kwargs)  # noqa: SIM115
        left[0] -= 1
        return file if left[0] else die()

    def faulty_remove(self, path):
        if is_due(path):
            die()
        os.remove(path)

    if at in ('write', 'full'):
        atomic_io.open = faulty_open
    elif at in ('before rename', 'after rename'):
        os.replace = faulty_replace
    elif at == 'pointer':
        checkpoint_hook.open = faulty_pointer
    elif at == 'remove':
        atomic_io.AtomicLocalBackend.remove = faulty_remove
    elif at == 'limit':
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault['bytes'], fault['bytes']))
    else:
        raise ValueError(at)


def wait_for(pid: int) -> int:
    """Return the exit code of a training, which is aborted if it does not end."""
    end = time.monotonic() + LIMIT
    signals = [signal.SIGABRT, signal.SIGKILL]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if signals and time.monotonic() > end:
            os.killpg(pid, signals.pop(0))
            end = time.monotonic() + 5
        time.sleep(0.005)


def serve() -> None:
    # Libraries print on the standard output, too.
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    import torch
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS
    from mmengine.runner import runner as mmengine_runner
    from yapf.yapflib import yapf_api

    torch.set_num_threads(1)
    from mmvim.cli.launcher import main_train
    from mmvim.compat import require
    from mmvim.registry import MODELS

    for module in ('mmpretrain.datasets', 'mmpretrain.models'):
        require(module, 'trainings of the tests')
    assert MODELS.get('mmvim.Vim') is not None
    # These take longer than the training.
    mmengine_runner.collect_env = dict
    yapf_api.FormatCode = lambda text, **_: (text, False)
    gc.collect()
    gc.freeze()

    @HOOKS.register_module()
    class RecordBatches(Hook):
        """Write which data each iteration gets, and what comes of it."""

        priority = 'LOWEST'

        def __init__(self, pause: float = 0.0):
            self.pause = pause

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            digest = hashlib.sha256()
            for image, sample in zip(data_batch['inputs'], data_batch['data_samples'], strict=True):
                digest.update(os.path.basename(sample.img_path).encode() + image.numpy().tobytes())
            with open('batches', 'a') as file:
                file.write(f'{runner.iter} {batch_idx} {digest.hexdigest()}\n')
            time.sleep(self.pause)

        def before_val_iter(self, runner, batch_idx, data_batch=None):
            with open('validations', 'a') as file:
                file.write(f'{runner.iter}\n')
            time.sleep(self.pause)

    @HOOKS.register_module()
    class KillWorker(Hook):
        """Kill a worker of the DataLoader in some iterations."""

        def __init__(self, at: tuple = (8,)):
            self.at = at

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter in self.at:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(0.2)

    for line in sys.stdin:
        command = json.loads(line)
        if command == 'stop':
            os._exit(0)
        if 'wait' in command:
            print(wait_for(command['wait']), file=answers)
            continue
        pid = os.fork()
        # A scheduler sends its signals to data loader workers as well. Whichever process is first
        # makes the group, so that it is there when either goes on.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        if pid:
            print(pid, file=answers)
            continue
        code = 1
        try:
            os.chdir(command['cwd'])
            log = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open(os.devnull, os.O_RDONLY)
            for target, handle in enumerate((null, log, log)):
                os.dup2(handle, target)
            faulthandler.enable()
            os.environ.update(command['env'])
            if command['fault']:
                install_fault(command['fault'])
            main_train(command['argv'])
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    serve()
