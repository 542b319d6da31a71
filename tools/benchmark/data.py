#!/usr/bin/env python3
"""Time the data pipeline of a config: samples a second, and where the time goes.

    python tools/benchmark/data.py configs/vim/vim-tiny_8xb128_in1k.py
    python tools/benchmark/data.py CONFIG --split val --workers 0 4 8 --need 3300
    python tools/benchmark/data.py CONFIG --cfg-options train_dataloader.batch_size=16

Batches are built by the config's own data loader and thrown away; nothing is trained. With 0
workers the samples are made in this process, one after the other, and each transform is timed.
`--need` is the rate that a device consumes (see tools/benchmark/models.py): the number of processes
that reach it is printed.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

import mmvim  # noqa: F401
from mmvim._configs import merge_options, read_config
from mmvim.cli.diagnosis import reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parse_args(argv)
    with reported_errors() as context:
        cfg = read_config(args.config)
        merge_options(cfg, args.cfg_options or {})
        context.cfg = cfg
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        key = f'{args.split}_dataloader'
        if not cfg.get(key):
            raise UserError(f'{args.config} has no {key}')
        rates = {}
        for workers in args.workers:
            loader, times = build(cfg[key], workers)
            rate = rates[workers] = measure(loader, args.samples)
            print(f'{workers:3} workers: {rate:9.1f} samples/s', flush=True)
            if workers == 0:
                print_transforms(times)
        if args.need:
            per_process = max(rate / max(1, workers) for workers, rate in rates.items())
            print(f'{args.need:g} samples/s need {args.need / per_process:.1f} such processes')
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--split', choices=('train', 'val', 'test'), default='train')
    parser.add_argument('--samples', type=at_least(1), default=512, help='timed, at least')
    parser.add_argument('--workers', type=at_least(0), nargs='+', default=[0, 2])
    parser.add_argument('--need', type=float, help='samples a second that a device consumes')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, metavar='KEY=VALUE')
    return parser.parse_args(argv)


def at_least(least: int) -> Callable[[str], int]:
    """A type of argument: an integer not below ``least``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f'must be at least {least}, got {value}')
        return value

    return integer


def build(config: dict, workers: int) -> tuple[DataLoader, Counter]:
    """The data loader with that many workers, and what its transforms will take."""
    config = config.copy()
    config['num_workers'] = workers
    config['persistent_workers'] = workers > 0
    if workers == 0:
        config.pop('prefetch_factor', None)
    loader = Runner.build_dataloader(config, seed=0)
    times: Counter = Counter()
    pipeline = getattr(innermost(loader.dataset), 'pipeline', None)
    if workers == 0 and pipeline is not None:
        pipeline.transforms = [timed(t, times) for t in pipeline.transforms]
    return loader, times


def innermost(dataset: object) -> object:
    """The data set inside wrappers."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset


def timed(transform: Callable, times: Counter) -> Callable:
    """The transform, adding its seconds to ``times``."""

    def call(results):
        start = time.perf_counter()
        results = transform(results)
        times[type(transform).__name__] += time.perf_counter() - start
        return results

    return call


def measure(loader: DataLoader, samples: int) -> float:
    """Samples a second, over as many epochs as that takes.

    Workers begin together, so that their first batches come all at once: the clock starts after
    that round, and stops after whole ones.
    """
    workers = max(1, loader.num_workers)
    if len(loader) <= workers:
        raise UserError(
            f'an epoch of {len(loader)} batches is too short for {loader.num_workers} workers: '
            'make batch_size smaller'
        )
    seen, done = 0, 0
    while True:
        for batch in loader:
            done += 1
            if done <= workers:
                start = time.perf_counter()
                continue
            seen += size(batch)
            if seen >= samples and done >= 3 * workers and done % workers == 0:
                return seen / (time.perf_counter() - start)


def size(batch: dict) -> int:
    """Samples of a batch."""
    return len(batch['data_samples'])


def print_transforms(times: Counter) -> None:
    """Print the share of each transform."""
    total = sum(times.values())
    for name, seconds in times.most_common():
        print(f'      {100 * seconds / total:5.1f} %  {name}')


if __name__ == '__main__':
    raise SystemExit(main())
