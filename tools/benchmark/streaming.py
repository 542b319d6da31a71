#!/usr/bin/env python3
"""Time a stream, one chunk after the other: latency of a chunk, and memory.

    python tools/benchmark/streaming.py                           # tiny, causal, one frame a chunk
    python tools/benchmark/streaming.py --models tiny middle --modes causal block --csv stream.csv

Weights and frames are random and the frames are on the device. A chunk is timed from the call to
the end of its work on the device, as the next chunk of a camera would find it; the first chunks,
which warm up and record the graph, are not counted. `graph` is `mmvim.models.GraphedStream`.
`growth` is the time of the last tenth of the chunks over that of the first.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import describe, open_rows, positive
from models import DTYPES, release

from mmvim.models import GraphedStream, StreamingVideoMamba

MODELS = ('tiny', 'small', 'middle')
MODES = ('causal', 'block', 'lookahead')
WARM_UP = 8


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    mode: str
    run: str
    dtype: str
    batch: int
    frames: int
    size: int
    median_ms: float
    p99_ms: float
    frames_per_second: float
    growth: float
    mib: float


def main() -> int:
    """Measure, print and write."""
    args = parse_args()
    device = torch.device(args.device)
    print(describe(device), flush=True)
    names = [field.name for field in fields(Row)]
    with open_rows(args.csv, names, describe(device)) as write:
        for row in measure_all(args, device):
            write(asdict(row))
            print(line(row), flush=True)
    if args.csv:
        print(f'written: {args.csv}')
    return 0


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f'{row.model:8} {row.mode:10} {row.run:6} {row.batch} x {row.frames} x {row.size} '
        f'{row.median_ms:9.3f} ms (p99 {row.p99_ms:.3f}) {row.frames_per_second:9.1f} frames/s '
        f'growth {row.growth:.3f} {row.mib:8.1f} MiB'
    )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=MODELS, default=['tiny'])
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['causal'])
    parser.add_argument('--runs', nargs='+', choices=('eager', 'graph'))
    parser.add_argument('--frames', type=positive, default=1, help='of a chunk, and of a block')
    parser.add_argument('--lookahead-frames', type=positive, default=8)
    parser.add_argument('--batch', type=positive, default=1)
    parser.add_argument('--size', type=positive, default=224, help='of an image side')
    parser.add_argument('--chunks', type=positive, default=100)
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16', help='of autocast')
    parser.add_argument('--device', default='cuda' if cuda else 'cpu')
    parser.add_argument('--csv', type=Path)
    args = parser.parse_args()
    on_gpu = args.device.startswith('cuda')
    args.runs = args.runs or (['eager', 'graph'] if on_gpu else ['eager'])
    if 'graph' in args.runs and not on_gpu:
        parser.error(f'--runs graph needs a CUDA device, got --device {args.device}')
    return args


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Every model in every mode, with and without a graph."""
    for arch in args.models:
        for mode in args.modes:
            for run in args.runs:
                times, mib = measure(arch, mode, run, args, device)
                tenth = max(1, len(times) // 10)
                median = statistics.median(times)
                yield Row(
                    arch, mode, run, args.dtype, args.batch, args.frames, args.size,
                    median_ms=1e3 * median,
                    p99_ms=1e3 * sorted(times)[int(0.99 * (len(times) - 1))],
                    frames_per_second=args.batch * args.frames / median,
                    growth=statistics.median(times[-tenth:]) / statistics.median(times[:tenth]),
                    mib=mib,
                )  # fmt: skip
                release(device)


def measure(
    arch: str, mode: str, run: str, args: argparse.Namespace, device: torch.device
) -> tuple[list[float], float]:
    """Seconds of each chunk, and the peak of memory in MiB (not a number on a CPU)."""
    torch.manual_seed(0)
    options = {
        'causal': {},
        'block': {'block_frames': args.frames},
        'lookahead': {'lookahead_frames': args.lookahead_frames},
    }[mode]
    model = StreamingVideoMamba(
        arch, img_size=args.size, stream_mode=mode, beyond='clamp', **options
    )
    model = model.to(device).eval()
    step = GraphedStream(model) if run == 'graph' else lambda x, state: model(x, state=state)
    shape = (args.batch, 3, args.frames, args.size, args.size)
    chunks = [torch.randn(shape, device=device) for _ in range(4)]
    state = model.init_state(args.batch)
    warm_up = WARM_UP + (args.lookahead_frames // args.frames if mode == 'lookahead' else 0)
    times = []
    dtype = DTYPES[args.dtype]
    low = dtype != torch.float32
    with torch.inference_mode(), torch.autocast(device.type, dtype if low else None, enabled=low):
        for i in range(warm_up + args.chunks):
            if i == warm_up and device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            _, _, state = step(chunks[i % len(chunks)], state)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    peak = float('nan')
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    return times[warm_up:], peak


if __name__ == '__main__':
    raise SystemExit(main())
