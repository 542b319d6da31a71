#!/usr/bin/env python
"""Data, training, test and report of one quickstart: python tools/quickstart/run.py cls"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_THREADS = 8


@dataclass(frozen=True)
class Quickstart:
    """Differences between the tasks.

    Attributes:
        config: path of the config inside the repository.
        library: package that the config needs.
        test_out: output of ``tools/test.py --out``, inside ``<work dir>/test``.
    """

    config: str
    library: str
    test_out: str


QUICKSTARTS = {
    'cls': Quickstart('configs/quickstart/vim_digits_cls.py', 'mmpretrain', 'predictions.pkl'),
    'det': Quickstart('configs/quickstart/vim_digits_det.py', 'mmdet', 'predictions.pkl'),
    'video': Quickstart(
        'configs/quickstart/videomamba_digits_video.py', 'mmpretrain', 'predictions.pkl'
    ),
    'seg': Quickstart('configs/quickstart/vim_digits_seg.py', 'mmseg', 'label_maps'),
}


class StepFailed(RuntimeError):
    """A step of the quickstart failed; the message says what to do."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Make the data (if need be), train through tools/train.py, test the best '
        'checkpoint through tools/test.py, draw pictures and print the result.'
    )
    parser.add_argument('task', choices=list(QUICKSTARTS))
    parser.add_argument('--config', help="another recipe for the task's data (default: the task's)")
    parser.add_argument(
        '--work-dir', default='work_dirs/quickstart', help='gets <task>/ (default: %(default)s)'
    )
    parser.add_argument(
        '--data-dir', default='data/quickstart', help='gets <task>/ (default: %(default)s)'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as in tools/train.py'
    )
    return parser.parse_args()


def step(title: str, script: str, *arguments: str, hint: str) -> float:
    """Run a script in the repository root, echoed, and return the seconds it took."""
    print(f'\n==> {title}\n+ {shlex.join(["python", script, *arguments])}', flush=True)
    start = time.perf_counter()
    command = [sys.executable, script, *arguments]
    # Tensors are small here: more threads than this only wait for each other.
    threads = str(min(os.cpu_count() or 1, MOST_THREADS))
    environment = {'OMP_NUM_THREADS': threads, **os.environ}
    try:
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
    except KeyboardInterrupt:
        raise StepFailed(f'{title}: interrupted') from None
    if code:
        raise StepFailed(f'{title}: failed with exit code {code} (its message is above). {hint}')
    return time.perf_counter() - start


def display(path: Path) -> str:
    """The path as seen from the repository when it is inside, else absolute."""
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def best_checkpoint(work_dir: Path, since: float) -> Path:
    """The best checkpoint written after ``since``; those of earlier runs are removed."""
    found = sorted(work_dir.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    if not found or found[-1].stat().st_mtime < since:
        raise StepFailed(f'training left no best_*.pth in {display(work_dir)}: see its log there')
    for old in found[:-1]:
        old.unlink()
    return found[-1]


def run(args: argparse.Namespace) -> None:
    """Run all steps."""
    quickstart = QUICKSTARTS[args.task]
    if args.config is not None:
        quickstart = replace(quickstart, config=display(Path(args.config).resolve()))
    if importlib.util.find_spec(quickstart.library) is None:
        raise StepFailed(
            f'{quickstart.library} is not installed here: run this through make, or '
            "pip install 'mmvim[onedl,quickstart]'"
        )
    # Relative paths are meant from where the command was given; the steps run in the repository.
    data_dir = Path(args.data_dir).resolve()
    work_dir = Path(args.work_dir).resolve() / args.task
    test_dir = work_dir / 'test'
    options = [*data_options(args.task, data_dir), *args.cfg_options]
    options = ['--cfg-options', *options] if options else []

    step(
        'data',
        'tools/quickstart/make_data.py',
        args.task,
        *('--out', display(data_dir)),
        hint='Another folder: --data-dir (make DATA_DIR=...).',
    )
    since = time.time() - 1
    seconds = step(
        'training',
        'tools/train.py',
        quickstart.config,
        *('--work-dir', display(work_dir)),
        *options,
        hint=f'Its log is in {display(work_dir)}. Out of memory: --cfg-options '
        'train_dataloader.batch_size=8. Disk full: free some space, or choose another folder '
        'with --work-dir (make WORK_DIR=...).',
    )
    checkpoint = best_checkpoint(work_dir, since)
    step(
        'test',
        'tools/test.py',
        quickstart.config,
        display(checkpoint),
        *('--work-dir', display(test_dir)),
        *('--out', display(test_dir / quickstart.test_out)),
        *options,
        hint=f'Its log is in {display(test_dir)}.',
    )
    with open(work_dir / 'run.json', 'w') as file:
        json.dump(
            {
                'config': quickstart.config,
                'options': args.cfg_options,
                'checkpoint': checkpoint.name,
                'training_seconds': round(seconds, 1),
            },
            file,
            indent=2,
        )
    step(
        'report',
        'tools/quickstart/report.py',
        args.task,
        display(work_dir),
        *('--data-dir', display(data_dir)),
        hint='Training and test are done; only the pictures are missing.',
    )


def data_options(task: str, data_dir: Path) -> list[str]:
    """The config options that name another data folder than the config's."""
    if data_dir == REPOSITORY / 'data' / 'quickstart':
        return []
    root = display(data_dir / task)
    options = [f'{part}_dataloader.dataset.data_root={root}' for part in ('train', 'val', 'test')]
    if task == 'det':
        options += [
            f'{part}_evaluator.ann_file={root}/annotations/instances_{part}.json'
            for part in ('val', 'test')
        ]
    return options


def main() -> int:
    """Run the tool."""
    args = parse_args()
    try:
        run(args)
    except StepFailed as error:
        print(f'\nquickstart: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
