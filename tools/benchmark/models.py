#!/usr/bin/env python3
"""Time whole models: images (or clips) a second, latency and memory, in inference and training.

    python tools/benchmark/models.py                                    # every built-in model
    python tools/benchmark/models.py --models vim-t mambavision-t --modes inference
    python tools/benchmark/models.py --models mambavision-t --peers mambavision --csv models.csv

Weights and inputs are random and stay on the device, so neither a data pipeline nor a checkpoint is
timed. Inference is one forward pass under autocast without gradients; a training step is forward,
cross-entropy, backward and AdamW. `graph` captures either in a CUDA graph, `compile` passes the
model through `torch.compile`. Times are medians over single passes, measured with CUDA events (with
the clock on a CPU). `GiB` is the peak of what PyTorch had allocated, weights included.

Peers are other packages' models, measured in the same run when they can be imported:
`mambavision` (the official package, which needs `mamba_ssm`; `--peer-path` adds folders to the
import path) and `timm` models of similar size.
"""

import argparse
import contextlib
import csv
import gc
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmvim
from mmvim.ops import backend_info

CLASSES = 1000
DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
MODES = ('inference', 'training')
RUNS = ('eager', 'compile', 'graph')


@dataclass(frozen=True)
class Case:
    """A model with its usual batch: `build` makes it, `shape` is one sample's."""

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    channels_last: bool = False


class Classifier(nn.Module):
    """A backbone and the linear layer that classifiers put on its pooled features."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, …) images or clips to (batch, classes)."""
        return self.head(self.backbone(x)[-1])


def _vim(arch: str, features: int, **options) -> Callable[[], nn.Module]:
    return lambda: Classifier(mmvim.Vim(arch=arch, **options), features)


def _videomamba(arch: str, features: int, **options) -> Callable[[], nn.Module]:
    return lambda: Classifier(mmvim.VideoMamba(arch=arch, **options), features)


def _mambavision(arch: str, features: int) -> Callable[[], nn.Module]:
    # Without drop path: the official code takes the rate and then ignores it.
    return lambda: Classifier(mmvim.MambaVision(arch=arch, drop_path_rate=0.0), features)


def _official_mambavision(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module('mambavision').create_model(name, pretrained=False)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module('timm').create_model(name, pretrained=False)


IMAGE = (3, 224, 224)
MODELS = {
    'vim-t': Case(_vim('tiny', 192), 128, IMAGE),
    'vim-s': Case(_vim('small', 384), 128, IMAGE),
    'vim-b': Case(_vim('base', 768), 64, IMAGE),
    'vim-t-1024': Case(_vim('tiny', 192, img_size=1024), 2, (3, 1024, 1024)),
    'videomamba-t': Case(_videomamba('tiny', 192), 128, IMAGE),
    'videomamba-t-8x224': Case(_videomamba('tiny', 192, num_frames=8), 32, (3, 8, 224, 224)),
    'videomamba-m-16x224': Case(_videomamba('middle', 576, num_frames=16), 8, (3, 16, 224, 224)),
    'mambavision-t': Case(_mambavision('tiny', 640), 128, IMAGE, channels_last=True),
    'mambavision-s': Case(_mambavision('small', 768), 128, IMAGE, channels_last=True),
    'mambavision-b': Case(_mambavision('base', 1024), 128, IMAGE, channels_last=True),
}
PEERS = {
    'mambavision': {
        'mambavision-t': _official_mambavision('mamba_vision_T'),
        'mambavision-s': _official_mambavision('mamba_vision_S'),
        'mambavision-b': _official_mambavision('mamba_vision_B'),
    },
    'timm': {
        'vim-t': _timm('deit_tiny_patch16_224'),
        'vim-s': _timm('deit_small_patch16_224'),
        'mambavision-t': _timm('swin_tiny_patch4_window7_224'),
    },
}


@dataclass(frozen=True)
class Row:
    """One line of the table; `rate` in samples a second, `milliseconds` per pass."""

    model: str
    package: str
    mode: str
    run: str
    dtype: str
    batch: int
    size: str
    rate: float
    milliseconds: float
    gib: float
    note: str = ''


def main() -> int:
    """Measure, print and write."""
    args = parse_args()
    for folder in args.peer_path:
        sys.path.insert(0, folder)
    device = torch.device(args.device)
    print(describe(device), flush=True)
    rows = []
    for row in measure_all(args, device):
        rows.append(row)
        print(line(row), flush=True)
    if args.csv:
        write_csv(args.csv, rows, device)
        print(f'written: {args.csv}')
    return int(any(row.note for row in rows))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS), metavar='M',
                        help=f'default: all of {", ".join(MODELS)}')  # fmt: skip
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--runs', nargs='+', choices=RUNS, default=['eager'])
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16', help='of autocast')
    parser.add_argument('--batch', type=positive, help='instead of each model’s usual batch')
    parser.add_argument('--size', type=positive, help='of an image side, instead of the usual one')
    parser.add_argument('--peers', nargs='*', choices=PEERS, default=[])
    parser.add_argument('--peer-path', nargs='*', default=[], metavar='FOLDER')
    parser.add_argument('--repeats', type=positive, default=20)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--csv', type=Path)
    args = parser.parse_args()
    if 'graph' in args.runs and not args.device.startswith('cuda'):
        parser.error(f'--runs graph needs a CUDA device, got --device {args.device}')
    return args


def positive(text: str) -> int:
    """A positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be positive, got {value}')
    return value


def describe(device: torch.device) -> str:
    """The machine and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor()
    info = backend_info()
    kernels = info.get(f'{device.type}_kernels', []) if info['loaded'] else []
    return (
        f'# {name or platform.machine()}, torch {torch.__version__}, mmvim {mmvim.__version__}, '
        f'compiled ops: {", ".join(kernels) or "none"}'
    )


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Every wanted model, mmvim's first, then its peers."""
    for name in args.models:
        case = MODELS[name]
        builders = {'mmvim': case.build}
        builders |= {peer: PEERS[peer][name] for peer in args.peers if name in PEERS[peer]}
        shape = case.shape if args.size is None else (*case.shape[:-2], args.size, args.size)
        batch = args.batch or case.batch
        for package, build in builders.items():
            for run in args.runs:
                for mode in args.modes:
                    labels = (name, package, mode, run, args.dtype, batch)
                    size = 'x'.join(map(str, shape[1:]))
                    try:
                        seconds, gib = measure(
                            build, (batch, *shape), mode, run, case.channels_last, args, device
                        )
                    except (ImportError, RuntimeError, ValueError) as error:
                        reason = str(error).splitlines()[0] if str(error) else repr(error)
                        nothing = float('nan')
                        yield Row(*labels, size, nothing, nothing, nothing, reason[:160])
                        continue
                    finally:
                        release(device)
                    yield Row(*labels, size, batch / seconds, 1e3 * seconds, gib)


def measure(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    mode: str,
    run: str,
    channels_last: bool,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[float, float]:
    """Median seconds of a pass and peak GiB."""
    torch.manual_seed(0)
    model = build().to(device).train(mode == 'training')
    inputs = torch.randn(shape, device=device)
    if channels_last and inputs.dim() == 4 and device.type == 'cuda':
        model, inputs = (x.to(memory_format=torch.channels_last) for x in (model, inputs))
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    network = torch.compile(model) if run == 'compile' else model
    dtype = DTYPES[args.dtype]
    autocast = (
        (lambda: torch.autocast(device.type, dtype))
        if dtype != torch.float32
        else contextlib.nullcontext
    )
    if mode == 'inference':

        def step() -> None:
            with torch.inference_mode(), autocast():
                network(inputs)

    else:
        labels = torch.randint(CLASSES, shape[:1], device=device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, fused=device.type == 'cuda', capturable=run == 'graph'
        )

        def step() -> None:
            with autocast():
                logits = network(inputs)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    if run == 'graph':
        step = captured(step)
    for _ in range(min(5, args.repeats)):
        step()
    return timed(step, args.repeats, device), peak(device)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, after warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median seconds of one call."""
    if device.type != 'cuda':
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def peak(device: torch.device) -> float:
    """Peak GiB allocated on the GPU; not known on a CPU."""
    if device.type != 'cuda':
        return float('nan')
    return torch.cuda.max_memory_allocated(device) / 2**30


def release(device: torch.device) -> None:
    """Give back what the model before held."""
    gc.collect()
    torch.compiler.reset()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def line(row: Row) -> str:
    """A row of the table."""
    head = (
        f'{row.model:20} {row.package:12} {row.mode:10} {row.run:8} {row.batch:4} x {row.size:12}'
    )
    if row.note:
        return f'{head} failed: {row.note}'
    return f'{head} {row.rate:10.1f}/s {row.milliseconds:9.2f} ms {row.gib:7.2f} GiB'


def write_csv(path: Path, rows: list[Row], device: torch.device) -> None:
    """Write the rows below a line that names the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        file.write(describe(device) + '\n')
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == '__main__':
    raise SystemExit(main())
