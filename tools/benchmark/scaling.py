#!/usr/bin/env python3
"""Time training on one, two, … devices: samples a second, and the factor over one.

    python tools/benchmark/scaling.py                               # Vim-T, 1 to all GPUs here
    python tools/benchmark/scaling.py --config configs/vim/vim-small_8xb64_in1k.py --batch 256
    python tools/benchmark/scaling.py --processes 1 2 8 --iterations 200 --csv scaling.csv
    python tools/benchmark/scaling.py --config A.py B.py --cfg-options graph=False \
        --cfg-options graph=True "model_wrapper_cfg=dict(static_graph=True)"

Several configs are measured one after the other, and each of them with every `--cfg-options`. What
fails is reported, and the rest goes on.

Each count is a run of tools/dist_train.sh, as a user starts it, with the model, optimizer, schedule
and hooks of a config (a classifier's, of images or clips, a detector's or a segmentor's), but with
batches that cost nothing, without validation and without files: neither data nor weights are
needed, and no data pipeline is timed (tools/benchmark/data.py does that). A batch still goes from
pinned memory to the device and through Mixup and CutMix. The clock runs between synchronizations of
all processes, after the warm-up; how long they take to start does not matter. The batch is that of
one process. Without a GPU the processes run on the CPU, through gloo.

On GPUs the table also has the peak of memory, and the milliseconds of rank 0's kernels in an
iteration after the clock: NCCL's, which include waiting for other processes and may overlap with
others, and all others. What an iteration takes beyond these is time that the GPU waited.
"""

import argparse
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import describe, open_rows, positive
from mmengine.config import Config

from mmvim._configs import read_config, type_name
from mmvim.cli import flags
from mmvim.cli.config_keys import walk_dicts
from mmvim.cli.diagnosis import EXIT_CODE, reported_errors
from mmvim.cli.options import ConfigOptions
from mmvim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / 'configs' / 'vim' / 'vim-tiny_8xb128_in1k.py'
# Pixels of an image side by task; a classifier's are its backbone's img_size.
SIDES = {'mmpretrain': None, 'mmdet': 1024, 'mmseg': 512}
DTYPES = ('bfloat16', 'float16', 'float32')


@dataclass(frozen=True)
class Row:
    """One line of the table; `rate` in samples a second, `factor` over one process.

    `gib`, `kernels` and `nccl` (milliseconds of an iteration) are of rank 0, NaN without a GPU.
    """

    config: str
    options: str
    processes: int
    batch: int
    dtype: str
    rate: float
    milliseconds: float
    factor: float
    gib: float
    kernels: float
    nccl: float


class Options(ConfigOptions):
    """``--cfg-options``, of which each is one way to train: a list of texts and dicts."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Add one."""
        one = argparse.Namespace()
        super().__call__(parser, one, values, option_string)
        earlier = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*earlier, (' '.join(values), getattr(one, self.dest))])


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    args = parse_args(argv)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    head = describe(device)
    print(head, flush=True)
    failed = 0
    with open_rows(args.csv, [field.name for field in fields(Row)], head) as write:
        for config, options in itertools.product(args.config, args.cfg_options or [('', {})]):
            try:
                with reported_errors() as context, tempfile.TemporaryDirectory() as folder:
                    context.cfg = cfg = read(config, options[1])
                    for row in measure_all(cfg, config.stem, options[0], args, Path(folder)):
                        write(asdict(row))
                        print(line(row), flush=True)
            except SystemExit as error:
                if error.code != EXIT_CODE:
                    raise
                failed = EXIT_CODE
    if failed:
        sys.exit(failed)
    return 0


def read(config: Path, options: dict) -> Config:
    """A config, changed as ``--cfg-options`` of tools/train.py would."""
    cfg = read_config(config)
    flags.apply_options(cfg, argparse.Namespace(cfg_options=options, no_pin_memory=False))
    return cfg


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', type=Path, nargs='+', default=[DEFAULT],
                        help=f'default: {DEFAULT.name}')  # fmt: skip
    parser.add_argument('--processes', nargs='+', type=positive, metavar='N',
                        help='default: 1 to all GPUs')  # fmt: skip
    parser.add_argument('--batch', type=positive, help="of one process; default: the config's")
    parser.add_argument('--size', type=positive, help="of an image side; default: the backbone's "
                        'img_size, else 224; 1024 for a detector, 512 for a segmentor')  # fmt: skip
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16', help='of autocast')
    parser.add_argument('--warm-up', type=positive, default=30, help='iterations before the clock')
    parser.add_argument('--iterations', type=positive, default=100, help='on the clock')
    parser.add_argument('--csv', type=Path)
    parser.add_argument('--cfg-options', nargs='+', action=Options, metavar='KEY=VALUE',
                        help='change the config; given again: measure with these, too')  # fmt: skip
    args = parser.parse_args(argv)
    args.processes = sorted(set(args.processes or range(1, max(gpus, 1) + 1)))
    if gpus and args.processes[-1] > gpus:
        parser.error(f'--processes {args.processes[-1]}: there are {gpus} GPUs')
    return args


def measure_all(
    cfg: Config, name: str, options: str, args: argparse.Namespace, folder: Path
) -> Iterator[Row]:
    """Every number of processes, the smallest first."""
    batch = args.batch or cfg.get('train_dataloader', {}).get('batch_size')
    if batch is None:
        raise UserError(f'{name} has no train_dataloader.batch_size: give --batch')
    one = None
    for processes in args.processes:
        path, out = folder / f'{processes}.py', folder / f'{processes}.json'
        synthetic(cfg, batch, processes, args, out, profiled=2).dump(path)
        train(path, processes, args.dtype)
        result = json.loads(out.read_text())
        if result['processes'] != processes:
            raise UserError(f'{result["processes"]} processes ran instead of {processes}')
        rate = args.iterations * batch * processes / result['seconds']
        one = rate if processes == 1 else one
        nan = float('nan')
        times = {kernel: ms for kernel, (_, ms) in result.get('kernels', {}).items()}
        nccl = sum(ms for kernel, ms in times.items() if 'nccl' in kernel)
        yield Row(
            name, options, processes, batch, args.dtype, rate,
            1e3 * result['seconds'] / args.iterations, rate / one if one else nan,
            result.get('gib', nan), sum(times.values()) - nccl if times else nan,
            nccl if times else nan,
        )  # fmt: skip


def synthetic(
    cfg: Config,
    batch: int,
    processes: int,
    args: argparse.Namespace,
    out: Path,
    profiled: int = 0,
) -> Config:
    """The config with the clock, and with batches that cost nothing.

    Raises:
        UserError: If it is not the config of a classifier, detector or segmentor.
    """
    file, cfg = cfg.filename, Config(cfg.to_dict())
    task, classes = cfg.get('default_scope'), class_count(cfg.get('model', {}))
    if task not in SIDES or classes is None:
        raise UserError(f'{file} is not the config of a classifier, detector or segmentor')
    for _, node in walk_dicts(cfg.model):
        weights = node.get('init_cfg')
        if isinstance(weights, dict) and type_name(weights).startswith('Pretrained'):
            node['init_cfg'] = None
    backbone = cfg.model.backbone
    frames = backbone.get('num_frames')
    usual = SIDES[task] or backbone.get('img_size', 224)
    side = args.size or usual
    if task == 'mmseg':
        cfg.model.data_preprocessor.size = (side, side)
    total = args.warm_up + args.iterations + profiled
    cfg.train_dataloader = dict(
        batch_size=batch,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='BenchmarkIndices', length=total * batch * processes),
        collate_fn=dict(
            type='benchmark_batch',
            shape=[3, frames, side, side] if frames else [3, side, side],
            classes=classes,
            task=task,
        ),
    )
    for split in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{split}_{part}'] = None
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.max_iters = total
    imports = (cfg.get('custom_imports') or {}).get('imports', [])
    cfg.custom_imports = dict(imports=[*imports, 'synthetic'], allow_failed_imports=False)
    logger = dict(type='LoggerHook', interval=total + 1)
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'checkpoint': None, 'logger': logger}
    clock = dict(
        type='BenchmarkClock',
        warm_up=args.warm_up,
        iterations=args.iterations,
        out=str(out),
        profiled=profiled,
    )
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or ()), clock]
    cfg.load_from, cfg.resume = None, False
    return cfg


def class_count(model: dict) -> int | None:
    """Number of classes of a model's heads, or None if they do not state it."""
    roi_head = model.get('roi_head') or {}
    heads = [model.get(name) for name in ('head', 'bbox_head', 'decode_head')]
    heads.append(roi_head.get('bbox_head'))
    heads = [head[0] if isinstance(head, list) else head for head in heads]
    return next((head['num_classes'] for head in heads if head and 'num_classes' in head), None)


def train(config: Path, processes: int | None, dtype: str) -> None:
    """Run tools/dist_train.sh, or tools/train.py where ``processes`` is None.

    Raises:
        UserError: If it fails, with the reason that it gave; without one its output is printed.
    """
    if processes is None:
        command = [sys.executable, ROOT / 'tools' / 'train.py', config]
    else:
        command = ['bash', ROOT / 'tools' / 'dist_train.sh', config, processes]
    command += ['--no-checks', '--work-dir', config.with_suffix('')]
    if dtype != 'float32':
        command += ['--amp-dtype', dtype]
    path = [str(Path(__file__).resolve().parent), os.environ.get('PYTHONPATH')]
    environment = {
        # torchrun's own choice for more than one process, here for one too.
        'OMP_NUM_THREADS': '1',
        **os.environ,
        'PYTHON': sys.executable,
        'PYTHONPATH': os.pathsep.join(filter(None, path)),
        'PORT': free_port(),
    }
    log = config.with_suffix('.log')
    with log.open('w') as file:
        process = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    if code:
        lines = log.read_text(errors='replace').splitlines()
        reason = next((text for text in lines if text.startswith('error: ')), None)
        if reason is None:
            print(*lines[-60:], sep='\n', file=sys.stderr)
        raise UserError(
            f'training with --processes {processes or 1} ended with code {code}'
            + (f': {reason.removeprefix("error: ")}' if reason else '')
        )


def free_port() -> str:
    """A free port."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return str(sock.getsockname()[1])


def line(row: Row) -> str:
    """A row of the table."""
    factor = '' if math.isnan(row.factor) else f'{row.factor:.2f}x'
    text = (
        f'{row.processes:3} x {row.batch} {row.rate:10.1f}/s {row.milliseconds:9.2f} ms '
        f'{factor:>7}  {row.config} {row.options}'.rstrip()
    )
    if math.isnan(row.gib):
        return text
    return f'{text} ({row.gib:.2f} GiB; kernels {row.kernels:.2f} ms, NCCL {row.nccl:.2f} ms)'


if __name__ == '__main__':
    # The processes of a run end with this one.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    raise SystemExit(main())
