#!/usr/bin/env python3
"""Run the study of discretizations over the GPUs that are there, and continue it.

    python tools/studies/discretization/run.py --out results               # everything
    python tools/studies/discretization/run.py --out results --parts main --minutes 9
    python tools/studies/discretization/run.py --out results --list        # what is left
    python tools/studies/discretization/run.py --out again --parts main --methods foh --seeds 1

A run is a training by tools/train.py; when it ends it becomes a row of <out>/runs.csv, and after a
run of the part `main`, which keeps its checkpoint in <work-dir>, its swaps and step sizes become
rows of <out>/swaps.csv and <out>/steps.csv (examine.py). A run that has a row is not run again, so
the same command continues an interrupted study; a run that failed has none. The parts:

main       9 methods x 5 seeds (--seeds), 64 tokens
fine-tune  one more epoch with another method: from zoh to each, from each to zoh, 3 seeds;
           needs the checkpoints of `main`
rate       9 methods x 0.5 and 2 times the learning rate x 2 seeds
length     zoh, bilinear and the best other method of `main` x 3 seeds, 256 tokens
faults     the faults of earlier code (earlier_code.py): zoh's gradients for five methods, and A
           scaled twice, 3 seeds

They run in this order, fine-tuning after each seed of `main`, and further seeds last.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

import mmvim
from mmvim.ops import DISCRETIZATIONS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CONFIGS = ROOT / 'configs' / 'studies' / 'discretization'
PARTS = ('main', 'fine-tune', 'rate', 'length', 'faults')
# The third method of `length`, until `main` tells which.
BEST = 'best'
SEEDS = 5
# One epoch at a tenth of the learning rate, falling to nothing.
FINE_TUNING = (
    *('train_cfg.max_epochs=1', 'default_hooks.checkpoint.interval=1'),
    "param_scheduler=[dict(type='LinearLR', start_factor=1.0, end_factor=0.01, begin=0, end=1, "
    'by_epoch=True, convert_to_iter_based=True)]',
)


@dataclass(frozen=True)
class Run:
    """One training. `origin` is the method of the checkpoint it starts from, `fault` of the code.

    `rate` is a factor of the config's learning rate.
    """

    part: str
    config: str
    method: str
    seed: int
    rate: float = 1.0
    origin: str = ''
    fault: str = ''

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = (self.part, self.config, self.origin, self.method, self.fault)
        return '_'.join(filter(None, (*parts, f'x{self.rate:g}', f'seed{self.seed}')))

    @property
    def source(self) -> Run:
        """The run whose checkpoint a fine-tuning starts from."""
        return Run('main', self.config, self.origin, self.seed)


@dataclass(frozen=True)
class Result:
    """Results that a run adds to its row.

    `status` is 'finished', 'nan' (a loss that is not finite) or 'failed' (such a run has no row);
    `top1` is the last accuracy in percent, `top1_by_epoch` all; `loss` is that of the last epoch;
    `images_per_second` is that of a process beside `processes` - 1 others on its GPU, of training
    without validation; `memory` is PyTorch's peak in MiB.
    """

    status: str
    top1: float
    top1_by_epoch: str
    loss: float
    images_per_second: float
    memory: float
    seconds: float
    processes: int
    device: str
    torch: str
    mmvim: str
    revision: str
    finished: str


COLUMNS = [f.name for f in (*fields(Run), *fields(Result))]


def grid(seeds: int = SEEDS) -> list[Run]:
    """All runs in their order; those of a seed stand together, so that what has run is balanced."""
    short, long = 'vim_cifar10', 'vim-patch2_cifar10'
    methods = DISCRETIZATIONS
    runs = []
    for seed in range(SEEDS):
        runs += [Run('main', short, m, seed) for m in methods]
        if seed < 3:
            swaps = [('zoh', m) for m in methods] + [(m, 'zoh') for m in methods if m != 'zoh']
            runs += [Run('fine-tune', short, m, seed, 0.1, origin=origin) for origin, m in swaps]
    for seed in range(2):
        runs += [Run('rate', short, m, seed, rate) for rate in (0.5, 2.0) for m in methods]
    for seed in range(3):
        runs += [Run('length', long, m, seed) for m in ('zoh', 'bilinear', BEST)]
    for seed in range(3):
        faulty = ('foh', 'bilinear', 'poly', 'highorder', 'rk4')
        runs += [Run('faults', short, m, seed, fault='zoh-gradients') for m in faulty]
        runs.append(Run('faults', short, 'zoh', seed, fault='scaled-twice'))
    runs += [Run('main', short, m, seed) for seed in range(SEEDS, seeds) for m in methods]
    return [r for r in runs if r.seed < seeds]


def main(argv: list[str] | None = None) -> int:
    """Run what is left."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = Jobs(args)
    if args.list:
        print('\n'.join(run.name for run in jobs.left))
        return 0
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    devices = [str(i) for i in range(torch.cuda.device_count())] or ['']
    table = Tables(args.out)
    workers = [
        threading.Thread(target=work, args=(jobs, device, deadline, table, args))
        for _ in range(args.processes)
        for device in devices
    ]
    for worker in workers:
        worker.start()
        time.sleep(args.stagger)
    for worker in workers:
        worker.join()
    print(f'{table.added} runs finished, {len(Jobs(args).left)} left')
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True, help='folder of the tables')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--methods', nargs='+', choices=DISCRETIZATIONS, default=DISCRETIZATIONS)
    parser.add_argument('--seeds', type=int, default=SEEDS,
                        help='seeds of the part main (default: %(default)s)')  # fmt: skip
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/discretization'))
    parser.add_argument('--processes', type=int, default=8 if torch.cuda.is_available() else 1,
                        help='on each GPU, or on the CPU (default: 8 and 1)')  # fmt: skip
    parser.add_argument('--stagger', type=float, default=1.0, help='seconds between their starts')
    parser.add_argument('--minutes', type=float, help='stop runs that have not ended by then')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='change the configs of all runs')  # fmt: skip
    parser.add_argument('--list', action='store_true', help='print what is left and end')
    return parser.parse_args(argv)


class Jobs:
    """The runs that are left, for workers that take the next one that can start."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path = args.out / 'runs.csv'
        self._running: set[Run] = set()
        self._changed = threading.Condition()
        methods = {*args.methods, BEST}
        self._wanted = [
            run
            for run in grid(args.seeds)
            if run.method in methods and (run.origin or run.method) in methods
        ]
        done, third = finished(self._path), self._third()
        wanted = [replace(r, method=third) if r.method == BEST else r for r in self._wanted]
        self.left = [run for run in wanted if run.part in args.parts and run not in done]

    def _third(self) -> str:
        """The third method of `length`: the best other one of `main` once all of that has run."""
        done = finished(self._path)
        if any(r.part == 'main' and r.seed < SEEDS and r not in done for r in self._wanted):
            return BEST
        return best_other(self._path) or BEST

    def _waits(self, run: Run) -> bool:
        """Whether a run that is to come first has not ended."""
        coming = self._running.union(self.left)
        if run.method == BEST:
            return any(other.part == 'main' and other.seed < SEEDS for other in coming)
        return bool(run.origin) and run.source in coming

    def next(self) -> Run | None:
        """Take a run; None if there is none any more."""
        with self._changed:
            while self.left:
                run = next((r for r in self.left if not self._waits(r)), None)
                if run is None:
                    self._changed.wait()
                    continue
                self.left.remove(run)
                if run.method == BEST:
                    run = replace(run, method=self._third())
                self._running.add(run)
                return run
            return None

    def end(self, run: Run) -> None:
        """Let those start that have waited for a run."""
        with self._changed:
            self._running.discard(run)
            self._changed.notify_all()


def best_other(path: Path) -> str | None:
    """The method beside zoh and bilinear with the best mean of `main`; None without rows."""
    found: dict[str, list[float]] = {}
    for run, row in rows_of(path):
        if run.part == 'main' and run.seed < SEEDS and row['status'] == 'finished':
            found.setdefault(run.method, []).append(float(row['top1']))
    most = max(map(len, found.values()), default=0)
    means = {
        method: statistics.fmean(values)
        for method, values in found.items()
        if method not in ('zoh', 'bilinear') and len(values) == most
    }
    return max(means, key=means.get) if means else None


def rows_of(path: Path) -> Iterator[tuple[Run, dict[str, str]]]:
    """The runs that have a row, and the row."""
    if path.exists():
        with path.open(newline='') as file:
            for row in csv.DictReader(file):
                yield Run(**{f.name: type_of(f)(row[f.name]) for f in fields(Run)}), row


def finished(path: Path) -> set[Run]:
    """The runs that have a row."""
    return {run for run, _ in rows_of(path)}


def type_of(field) -> type:
    """The type of a column of :class:`Run`."""
    return {'str': str, 'int': int, 'float': float}[field.type]


class Tables:
    """The growing CSV files. A row is on disk when the call returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.added = 0

    def add(self, name: str, rows: Iterable[dict]) -> None:
        """Append rows to <name>.csv."""
        rows = list(rows)
        path = self._folder / f'{name}.csv'
        with self._lock, path.open('a', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            self.added += name == 'runs'


def work(
    jobs: Jobs, device: str, deadline: float, tables: Tables, args: argparse.Namespace
) -> None:
    """Run jobs on one device until none is left or the time is up."""
    while time.monotonic() < deadline and (run := jobs.next()) is not None:
        try:
            carry_out(run, device, deadline, tables, args)
        finally:
            jobs.end(run)


def carry_out(
    run: Run, device: str, deadline: float, tables: Tables, args: argparse.Namespace
) -> None:
    """Train, examine and add the rows."""
    result = train(run, device, deadline, args)
    if result is None:
        return
    if result.status == 'failed':
        print(f'{run.name} failed: {args.work_dir / run.name}/output.txt', file=sys.stderr)
        return
    if run.part == 'main' and result.status == 'finished':
        for name, rows in examine(run, device, args).items():
            tables.add(name, rows)
    tables.add('runs', [asdict(run) | asdict(result)])
    print(f'{run.name}: {result.status}, {result.top1:.2f} %, {result.seconds:.0f} s', flush=True)


def environment(device: str) -> dict[str, str]:
    """Variables of a process on one GPU."""
    paths = [str(ROOT), str(HERE), os.environ.get('PYTHONPATH', '')]
    found = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    found.setdefault('OMP_NUM_THREADS', '1')
    return found | ({'CUDA_VISIBLE_DEVICES': device} if device else {})


def command(run: Run, args: argparse.Namespace) -> list[str] | None:
    """The command line of a run; None if what it builds on is not there."""
    options = [
        f'model.backbone.discretization={run.method}',
        f'randomness.seed={run.seed}',
        *args.cfg_options,
    ]
    config = CONFIGS / f'{run.config}.py'
    if run.method == BEST:
        print(f'{run.name}: needs all runs of the part main', file=sys.stderr)
        return None
    if run.rate != 1:
        from mmengine.config import Config

        rate = Config.fromfile(config).optim_wrapper.optimizer.lr * run.rate
        options.append(f'optim_wrapper.optimizer.lr={rate:g}')
    if run.origin:
        checkpoint = last_checkpoint(args.work_dir / run.source.name)
        if checkpoint is None:
            print(f'{run.name}: needs the checkpoint of {run.source.name}', file=sys.stderr)
            return None
        options += [*FINE_TUNING, f'load_from={checkpoint}']
    hooks = {'shared_gpu': dict(type='OneCopy')}
    if run.fault:
        hooks['earlier_code'] = dict(type='EarlierCode', fault=run.fault)
    options += [
        f'custom_imports=dict(imports={list(hooks)}, allow_failed_imports=False)',
        f'custom_hooks={list(hooks.values())}',
    ]
    launcher = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config)]
    folder = ['--work-dir', str(args.work_dir / run.name)]
    return [*launcher, '--amp-dtype', 'bfloat16', *folder, '--cfg-options', *options]


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a finished run has left."""
    note = folder / 'last_checkpoint'
    path = Path(note.read_text().strip()) if note.exists() else None
    return path if path is not None and path.exists() else None


def train(run: Run, device: str, deadline: float, args: argparse.Namespace) -> Result | None:
    """Train; None if it could not start or the time was up before its end."""
    arguments = command(run, args)
    if arguments is None:
        return None
    folder = args.work_dir / run.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (folder / 'output.txt').open('w') as log:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment(device), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            process.wait(None if math.isinf(deadline) else max(deadline - start, 0))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return None
    return result(folder, process.returncode, time.monotonic() - start, args.processes)


def result(folder: Path, code: int, seconds: float, processes: int) -> Result:
    """Read what a run has logged."""
    lines = list(scalars(folder))
    training = [line for line in lines if 'loss' in line]
    top1 = [line['accuracy/top1'] for line in lines if 'accuracy/top1' in line]
    losses = [line['loss'] for line in training]
    last = [line['loss'] for line in training if line['epoch'] == training[-1]['epoch']]
    rates = [batch_size(folder) / line['time'] for line in training]
    broken = not all(map(math.isfinite, losses))
    nothing = float('nan')
    cuda = torch.cuda.is_available()
    return Result(
        status='nan' if broken else 'failed' if code or not top1 else 'finished',
        top1=round(top1[-1], 2) if top1 else nothing,
        top1_by_epoch=' '.join(f'{x:.2f}' for x in top1),
        loss=round(statistics.fmean(last), 5) if last else nothing,
        images_per_second=round(statistics.median(rates)) if rates else nothing,
        memory=max((line.get('memory', 0) for line in training), default=nothing),
        seconds=round(seconds, 1),
        processes=processes,
        device=torch.cuda.get_device_name() if cuda else 'cpu',
        torch=torch.__version__,
        mmvim=mmvim.__version__,
        revision=revision(),
        finished=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )


def batch_size(folder: Path) -> int:
    """The batch size in the config that a training has left in its folder."""
    from mmengine.config import Config

    return Config.fromfile(next(folder.glob('*.py'))).train_dataloader.batch_size


def scalars(folder: Path) -> Iterator[dict]:
    """The newest log of a work directory, line by line."""
    found = sorted(folder.glob('*/vis_data/scalars.json'))
    if found:
        yield from map(json.loads, found[-1].read_text().splitlines())


def revision() -> str:
    """The git revision, or what the variable MMVIM_REVISION says where there is no git."""
    called = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True
    )
    return called.stdout.strip() or os.environ.get('MMVIM_REVISION', 'unknown')


def examine(run: Run, device: str, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Rows of the tables swaps and steps for the checkpoint of a run."""
    folder = args.work_dir / run.name
    arguments = [str(CONFIGS / f'{run.config}.py'), str(last_checkpoint(folder)), run.method]
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    called = subprocess.run(
        [sys.executable, str(HERE / 'examine.py'), *arguments, *options],
        cwd=ROOT, env=environment(device), capture_output=True, text=True,
    )  # fmt: skip
    if called.returncode:
        print(f'{run.name}: examine.py failed\n{called.stderr}', file=sys.stderr)
        return {}
    tables = json.loads(called.stdout.splitlines()[-1])
    return {
        name: [dict(trained=run.method, seed=run.seed) | row for row in rows]
        for name, rows in tables.items()
    }


if __name__ == '__main__':
    sys.exit(main())
