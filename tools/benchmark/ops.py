#!/usr/bin/env python3
"""Time the ops and the installed peers in one run.

    python tools/benchmark/ops.py                                  # every op and built-in shape
    python tools/benchmark/ops.py --ops scan --shapes vim-t-224 --methods all
    python tools/benchmark/ops.py --device cpu --ops scan --dtypes float32 --csv cpu.csv

On a GPU, calls over several sets of inputs (more bytes than the cache holds) are captured in a CUDA
graph, so that only kernels and the gaps between them are timed; times are medians over replays.
`mamba_ssm`, `causal_conv1d` and VMamba's `oflex` scan are measured through their compiled functions
where those can be imported, or are given as files (`--peer`), on inputs in the layout they expect.

`HBM` is the share of the time in which the bytes of all inputs and outputs, each once, pass at the
speed of an elementwise kernel measured in the same run; `exp` that in which the special function
units compute one exponential per (batch, step, channel, state), and `error` the difference to the
PyTorch path in float64, relative in the Euclidean norm, on the first entries of the batch.
A CSV is written row by row: a run that is stopped leaves what it has measured, for --from-csv.
"""

import argparse
import contextlib
import csv
import gc
import importlib
import importlib.machinery
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import open_rows

from mmvim.ops import DISCRETIZATIONS, backend_info
from mmvim.ops.selective_scan import CHECKPOINT_INTERVAL

Thunk = Callable[[], object]

# name: (batch, channels, length, states), as the backbones use them.
SHAPES = {
    'vim-t-224': (128, 384, 197, 16),
    'vim-s-224': (128, 768, 197, 16),
    'vim-b-224': (64, 1536, 197, 16),
    'vim-t-1024': (2, 384, 4097, 16),
    'vim-s-512': (8, 768, 1025, 16),
    'videomamba-t-8x224': (32, 384, 1569, 16),
    'videomamba-m-16x224': (8, 1152, 3137, 16),
    'mambavision-t-stage3': (128, 160, 196, 8),
    'mambavision-t-stage4': (128, 320, 49, 8),
    'mambavision-b-stage3': (128, 256, 196, 8),
    'long': (1, 768, 65536, 16),
}
CPU_SHAPES = {'cpu-197': (8, 384, 197, 16), 'cpu-4096': (1, 384, 4096, 16)}
OPS = ('scan', 'bidirectional', 'conv', 'bidirectional-conv', 'norm')
DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
PEERS = {'mamba_ssm': 'selective_scan_cuda', 'oflex': 'selective_scan_cuda_oflex',
         'causal_conv1d': 'causal_conv1d_cuda'}  # fmt: skip
CONV_WIDTH = 4
CHECKPOINTS = CHECKPOINT_INTERVAL['cuda']  # steps between the states that forward keeps


@dataclass
class Row:
    """One measurement; times in microseconds, memory in MiB, shares and errors as fractions."""

    op: str
    shape: str
    batch: int
    channels: int
    length: int
    states: int
    dtype: str
    method: str
    implementation: str
    # forward, training-forward (which keeps states for backward), backward or forward+backward
    direction: str
    time: float
    fastest: float
    slowest: float
    gb_per_s: float
    hbm_share: float | None
    exp_share: float | None
    error: float | None
    peak_memory: float | None

    def __post_init__(self):
        # Five digits, so that a table of the file is that of the run.
        for name, value in vars(self).items():
            if isinstance(value, float):
                setattr(self, name, float(f'{value:.5g}'))


@dataclass
class Candidate:
    """One implementation on one set of inputs.

    Attributes:
        name: Implementation.
        forward: Without what backward needs.
        training_forward: With it; ``forward`` if there is no difference.
        make_backward: Gives the call of the backward pass, from a forward pass of its own.
        out: Forward's result as (batch, length, channels).
        grads: Backward's gradients of u, delta and z (or x), in the same layout.
        both: A forward and a backward pass in one call, with backward's result: what can be
            compared with peers whose backward pass is autograd's.
    """

    name: str
    forward: Thunk
    training_forward: Thunk | None = None
    make_backward: Callable[[], Thunk] | None = None
    out: Callable[[object], torch.Tensor] | None = None
    grads: Callable[[object], list[torch.Tensor]] | None = None
    both: Thunk | None = None


class Clock:
    """Times calls; one per input set."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds

    def __call__(self, calls: list[Thunk]) -> tuple[float, float, float]:
        """Median, fastest and slowest time of a call in microseconds."""
        times = self._cuda(calls) if self.device.type == 'cuda' else self._cpu(calls)
        return statistics.median(times), min(times), max(times)

    def _cpu(self, calls: list[Thunk]) -> list[float]:
        begin = time.perf_counter()
        calls[0]()
        # A call of many seconds, such as a peer's loop over steps in Python, is timed only once.
        least = 3 if time.perf_counter() - begin < 5 else 1
        times, start = [], time.perf_counter()
        while len(times) < least or (
            len(times) < 200 and time.perf_counter() - start < self.seconds
        ):
            call = calls[len(times) % len(calls)]
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
            if len(times) >= least and time.perf_counter() - start > 5 * self.seconds:
                break
        return times

    def _cuda(self, calls: list[Thunk], replays: int = 9) -> list[float]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            begin.record()
            calls[0]()
            end.record()
        torch.cuda.synchronize()
        estimate = max(begin.elapsed_time(end) * 1e3, 2.0)
        rounds = max(1, min(64, int(self.seconds * 1e6 / replays / estimate)) // len(calls))
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                # Results of one round live together, so that each call writes memory of its own.
                kept = [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(replays):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / rounds / len(calls))
        del kept, graph
        return times


def copy_rate(device: torch.device, clock: Clock) -> float:
    """Bytes per second, read and written, of the simplest pass over memory."""
    size = 2**29 if device.type == 'cuda' else 2**26
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # An elementwise kernel: a copy in a graph may be left to the slower copy engine.
    return 2 * size / clock([lambda: torch.bitwise_not(source, out=target)])[0] * 1e6


def exp_rate(device: torch.device, gigahertz: float) -> float | None:
    """Exponentials per second: 16 per clock and multiprocessor on every GPU since Turing."""
    if device.type != 'cuda':
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count * 16 * gigahertz * 1e9


def find_peers(given: list[str]) -> dict[str, object]:
    """Compiled modules of peers, by name; a file is NAME=PATH.

    Raises:
        ValueError: For a name that is not a peer or a file that is not there.
    """
    found = {}
    paths = {}
    for item in given:
        name, _, path = item.partition('=')
        if name not in PEERS or not Path(path).is_file():
            raise ValueError(f'--peer must be {"|".join(PEERS)}=FILE, got {item!r}')
        paths[name] = path
    for name, module in PEERS.items():
        if name in paths:
            loader = importlib.machinery.ExtensionFileLoader(module, paths[name])
            spec = importlib.util.spec_from_file_location(module, paths[name], loader=loader)
            found[name] = importlib.util.module_from_spec(spec)
            loader.exec_module(found[name])
            continue
        try:
            found[name] = importlib.import_module(module)
        except ImportError:
            continue
    return found


def scan_data(shape, dtype, device, seed):
    """Tensors of one scan; Δ around softplus(-4), as the models start with."""
    b, d, length, n = shape
    g = torch.Generator(device).manual_seed(seed)

    def r(*sizes):
        return torch.randn(*sizes, generator=g, device=device)

    return {
        'u': r(b, length, d).to(dtype),
        'delta': r(b, length, d).to(dtype),
        'A': -torch.arange(1, n + 1.0, device=device).repeat(d, 1),
        'B': r(b, length, 1, n).to(dtype),
        'C': r(b, length, 1, n).to(dtype),
        'D': r(d),
        'z': r(b, length, d).to(dtype),
        'delta_bias': r(d) * 0.5 - 4,
        'grad': r(b, length, d).to(dtype),
    }


NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


def mmvim_scan(x, method, name='mmvim', reverse=False) -> Candidate:
    """Our op, compiled or (``mmvim-torch``) the PyTorch path."""
    ops = torch.ops.mmvim_torch if name == 'mmvim-torch' else torch.ops.mmvim
    tensors = [x[k] for k in NAMES]
    interval = CHECKPOINT_INTERVAL[x['u'].device.type]

    def forward(keep=0):
        return ops.selective_scan(*tensors, None, True, method, reverse, False, keep)

    def make_backward():
        kept = forward(interval)[2]
        return lambda: ops.selective_scan_backward(
            x['grad'], None, *tensors, None, kept, True, method, reverse, interval
        )

    return Candidate(
        name,
        forward,
        lambda: forward(interval),
        make_backward,
        lambda r: r[0],
        lambda r: [r[0], r[1], r[6]],
        (lambda: make_backward()()) if x['u'].device.type == 'cpu' else None,
    )


def turned(t: torch.Tensor) -> torch.Tensor:
    """(b, l, d) as contiguous (b, d, l), and back."""
    return t.transpose(1, 2).contiguous()


def mamba_scan(module, x) -> Candidate:
    """`mamba_ssm`'s compiled functions."""
    u, delta, z, grad = (turned(x[k]) for k in ('u', 'delta', 'z', 'grad'))
    B, C = (x[k].permute(0, 2, 3, 1).contiguous() for k in ('B', 'C'))
    A, D, bias = x['A'], x['D'], x['delta_bias']

    def forward():
        return module.fwd(u, delta, A, B, C, D, z, bias, True)

    def make_backward():
        out, states, _ = forward()
        return lambda: module.bwd(
            u, delta, A, B, C, D, z, bias, grad, states, out, None, True, False
        )

    return Candidate(
        'mamba_ssm',
        forward,
        None,
        make_backward,
        lambda r: r[2].transpose(1, 2),
        lambda r: [r[0].transpose(1, 2), r[1].transpose(1, 2), r[7].transpose(1, 2)],
    )


def oflex_scan(module, x) -> Candidate:
    """VMamba's compiled functions, which have no gate: their output is not compared."""
    u, delta, grad = (turned(x[k]) for k in ('u', 'delta', 'grad'))
    B, C = (x[k].permute(0, 2, 3, 1).contiguous() for k in ('B', 'C'))
    A, D, bias = x['A'], x['D'], x['delta_bias']

    def forward():
        return module.fwd(u, delta, A, B, C, D, bias, True, 1, False)

    def make_backward():
        states = forward()[1]
        return lambda: module.bwd(u, delta, A, B, C, D, bias, grad, states, True, 1)

    return Candidate('oflex (no gate)', forward, None, make_backward)


def with_autograd(name, function, x) -> Candidate:
    """A differentiable function of the tensors of a scan, for CPU peers."""
    leaves = {k: x[k].detach().clone().requires_grad_() for k in NAMES}

    def forward():
        with torch.no_grad():
            return function(**leaves)

    def both():
        return torch.autograd.grad(function(**leaves), list(leaves.values()), x['grad'])

    return Candidate(name, forward, None, None, lambda r: r, lambda r: [r[0], r[1], r[6]], both)


def cpu_scan_peers(x, compiled) -> Iterator[Candidate]:
    """Scans of installed packages; with ``compiled`` one through TorchInductor, too."""
    softplus, silu = torch.nn.functional.softplus, torch.nn.functional.silu
    try:
        from mambapy.pscan import pscan
    except ImportError:
        pscan = None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    except ImportError:
        selective_scan_ref = None
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError:
        mamba_selective_scan = None

    def turning(function, **options):
        """Of tensors laid out as (batch, channels, length)."""

        def run(u, delta, A, B, C, D, z, delta_bias):
            u, delta, z = (t.transpose(1, 2) for t in (u, delta, z))
            B, C = (t.squeeze(2).transpose(1, 2) for t in (B, C))
            out = function(u, delta, A, B, C, D, z, delta_bias, True, **options)
            return out.transpose(1, 2)

        return run

    def by_pscan(u, delta, A, B, C, D, z, delta_bias):
        delta = softplus(delta + delta_bias)
        decay = torch.exp(delta.unsqueeze(-1) * A)
        h = pscan(decay, (delta * u).unsqueeze(-1) * B)
        return ((h @ C.squeeze(2).unsqueeze(-1)).squeeze(-1) + D * u) * silu(z)

    if pscan is not None:
        yield with_autograd('mambapy', by_pscan, x)
    if selective_scan_ref is not None:
        yield with_autograd('mamba_ssm reference', turning(selective_scan_ref), x)
    if mamba_selective_scan is not None:
        yield with_autograd('transformers', turning(mamba_selective_scan), x)
        if compiled:
            scan = turning(mamba_selective_scan, use_associative_scan=True)
            yield with_autograd('transformers, compiled', torch.compile(scan), x)


def scan_candidates(
    shape, dtype, device, seed, method, peers, torch_path, compiled
) -> list[Candidate]:
    """The implementations of a scan on one set of inputs; peers know only ``zoh``."""
    x = scan_data(shape, dtype, device, seed)
    found = [mmvim_scan(x, method)]
    if torch_path:
        found.append(mmvim_scan(x, method, 'mmvim-torch'))
    if method != 'zoh' or peers is None:
        return found
    if device.type == 'cuda':
        if 'mamba_ssm' in peers:
            found.append(mamba_scan(peers['mamba_ssm'], x))
        if 'oflex' in peers:
            found.append(oflex_scan(peers['oflex'], x))
    else:
        found += cpu_scan_peers(x, compiled)
    return found


def bidirectional_candidates(shape, dtype, device, seed, method) -> list[Candidate]:
    """One call for two directions, two calls, and two calls with the sum they need."""
    x, y = (scan_data(shape, dtype, device, 2 * seed + i) for i in (0, 1))
    ops = torch.ops.mmvim
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
    tensors = [*(x[k] for k in names), *(y[k] for k in names), x['z']]

    def forward(keep=0):
        return ops.bidirectional_scan(*tensors, 0.5, True, method, keep)

    def make_backward():
        kept = forward(CHECKPOINTS)[1:]
        return lambda: ops.bidirectional_scan_backward(
            x['grad'], *tensors, *kept, 0.5, True, method, CHECKPOINTS
        )

    one = Candidate('mmvim', forward, lambda: forward(CHECKPOINTS), make_backward)
    y = {**y, 'z': x['z'], 'grad': x['grad']}
    first, second = mmvim_scan(x, method), mmvim_scan(y, method, reverse=True)

    def make_two_backward():
        a, b = first.make_backward(), second.make_backward()
        return lambda: (a(), b())

    def make_summed_backward():
        two = make_two_backward()

        def run():
            a, b = two()
            return a, b, a[6] + b[6]

        return run

    return [
        one,
        Candidate(
            'two calls',
            lambda: (first.forward(), second.forward()),
            lambda: (first.training_forward(), second.training_forward()),
            make_two_backward,
        ),
        Candidate(
            'two calls, summed',
            lambda: (first.forward()[0] + second.forward()[0]) * 0.5,
            lambda: (first.training_forward()[0] + second.training_forward()[0]) * 0.5,
            make_summed_backward,
        ),
    ]


def conv_data(shape, dtype, device, seed):
    """Input, gradient and taps of a convolution; parameters are float32."""
    b, d, length, _ = shape
    g = torch.Generator(device).manual_seed(seed)
    x, grad = (torch.randn(b, length, d, generator=g, device=device).to(dtype) for _ in range(2))
    taps = [torch.randn(d, CONV_WIDTH, generator=g, device=device) for _ in range(2)]
    return x, grad, *taps, torch.randn(d, generator=g, device=device)


def conv_candidates(shape, dtype, device, seed, peers, both) -> list[Candidate]:
    """Causal convolutions with SiLU."""
    x, grad, w, w_b, bias = conv_data(shape, dtype, device, seed)
    ops = torch.ops.mmvim
    if both:

        def both_backward():
            return lambda: ops.bidirectional_conv1d_backward(
                grad, grad, x, w, bias, w_b, bias, True
            )

        def two_backward():
            def run():
                a = ops.causal_conv1d_backward(grad, None, x, w, bias, None, 'causal', True)
                b = ops.causal_conv1d_backward(grad, None, x, w_b, bias, None, 'reverse', True)
                return a[0] + b[0]

            return run

        return [
            Candidate(
                'mmvim',
                lambda: ops.bidirectional_conv1d(x, w, bias, w_b, bias, True),
                None,
                both_backward,
            ),
            Candidate(
                'two calls, summed',
                lambda: [
                    ops.causal_conv1d(x, taps, bias, None, mode, True, False)[0]
                    for taps, mode in ((w, 'causal'), (w_b, 'reverse'))
                ],
                None,
                two_backward,
            ),
        ]
    found = [
        Candidate(
            'mmvim',
            lambda: ops.causal_conv1d(x, w, bias, None, 'causal', True, False),
            None,
            lambda: (
                lambda: ops.causal_conv1d_backward(grad, None, x, w, bias, None, 'causal', True)
            ),
            lambda r: r[0],
            lambda r: [r[0]],
        )
    ]
    if 'causal_conv1d' in (peers or ()) and device.type == 'cuda':
        module = peers['causal_conv1d']
        xt, gt = turned(x), turned(grad)

        def forward():
            out = torch.empty_like(xt)
            module.causal_conv1d_fwd(xt, w, bias, None, None, out, None, True)
            return out

        def backward():
            dx = torch.empty_like(xt)
            dw, db = torch.zeros_like(w), torch.zeros_like(bias)
            module.causal_conv1d_bwd(xt, w, bias, gt, None, None, None, dx, dw, db, None, True)
            return dx, dw, db

        found.append(
            Candidate(
                'causal_conv1d',
                forward,
                None,
                lambda: backward,
                lambda r: r.transpose(1, 2),
                lambda r: [r[0].transpose(1, 2)],
            )
        )
    return found


def norm_candidates(shape, dtype, device, seed) -> list[Candidate]:
    """Residual addition and RMS norm, residual in float32."""
    b, d, length, _ = shape
    g = torch.Generator(device).manual_seed(seed)
    x, grad = (torch.randn(b, length, d, generator=g, device=device).to(dtype) for _ in range(2))
    residual, grad_residual = (
        torch.randn(b, length, d, generator=g, device=device) for _ in range(2)
    )
    weight = torch.randn(d, generator=g, device=device)

    def candidate(name, ops):
        def make_backward():
            _, kept, rstd = ops.add_rms_norm(x, residual, weight, 1e-5, True)
            return lambda: ops.add_rms_norm_backward(
                grad, grad_residual, kept, weight, rstd, True, dtype, torch.float32
            )

        return Candidate(
            name,
            lambda: ops.add_rms_norm(x, residual, weight, 1e-5, True),
            None,
            make_backward,
            lambda r: r[0],
            lambda r: [r[0]],
        )

    return [candidate('mmvim', torch.ops.mmvim), candidate('mmvim-torch', torch.ops.mmvim_torch)]


def least_bytes(op, direction, shape, dtype) -> int:
    """Bytes of all inputs and outputs, each once; parameters and kept states left out."""
    b, d, length, n = shape
    size = dtype.itemsize
    row, column = b * length * d * size, b * length * n * size
    backward = direction == 'backward'
    if op == 'scan':
        return 7 * row + 4 * column if backward else 4 * row + 2 * column
    if op == 'bidirectional':
        return 11 * row + 8 * column if backward else 6 * row + 4 * column
    if op == 'conv':
        return 3 * row if backward else 2 * row
    if op == 'bidirectional-conv':
        return 4 * row if backward else 3 * row
    wide = b * length * d * 4
    return 2 * row + 3 * wide if backward else 2 * row + 2 * wide


def exponentials(op, shape) -> int:
    """Of the recurrence alone."""
    b, d, length, n = shape
    return {'scan': 1, 'bidirectional': 2}.get(op, 0) * b * d * length * n


def peak_memory(candidate: Candidate, backward: bool, device) -> float | None:
    """Peak MiB of a forward pass, or a forward and a backward pass, without the inputs."""
    if device.type != 'cuda':
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if backward:
        result = candidate.make_backward()()
    else:
        result = candidate.forward()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class Errors:
    """Differences to float64 on the first entries of the batch."""

    ENTRIES = 2

    def __init__(self, op, shape, dtype, device, seed, method):
        self.exact = {}
        small = (min(shape[0], self.ENTRIES), *shape[1:])
        ops = torch.ops.mmvim_torch
        if op == 'scan':
            x = scan_data(shape, dtype, device, seed)
            x = {k: (v[: small[0]] if v.dim() > 2 else v).double() for k, v in x.items()}
            candidate = mmvim_scan(x, method, 'mmvim-torch')
        elif op == 'conv':
            x, grad, w, _, bias = conv_data(shape, dtype, device, seed)
            x, grad = x[: small[0]].double(), grad[: small[0]].double()
            w, bias = w.double(), bias.double()
            candidate = Candidate(
                '',
                lambda: ops.causal_conv1d(x, w, bias, None, 'causal', True, False),
                None,
                lambda: (
                    lambda: ops.causal_conv1d_backward(grad, None, x, w, bias, None, 'causal', True)
                ),
                lambda r: r[0],
                lambda r: [r[0]],
            )
        else:
            return
        self.exact['forward'] = [candidate.out(candidate.forward())]
        self.exact['backward'] = candidate.grads(candidate.make_backward()())

    def of(self, candidate: Candidate, direction: str) -> float | None:
        """Largest relative error of the results of one pass."""
        exact = self.exact.get('backward' if 'backward' in direction else 'forward')
        if exact is None or candidate.out is None:
            return None
        if direction == 'forward+backward':
            results = candidate.grads(candidate.both())
        elif direction == 'backward':
            results = candidate.grads(candidate.make_backward()())
        else:
            results = [candidate.out(candidate.forward())]
        errors = [
            ((r[: e.shape[0]].double() - e).norm() / e.norm()).item()
            for r, e in zip(results, exact, strict=True)
        ]
        return max(errors)


def candidates_of(
    op, shape, dtype, device, seed, method, peers, torch_path=False, compiled=False
) -> list[Candidate]:
    """All implementations of ``op`` on one set of inputs."""
    if op == 'scan':
        return scan_candidates(shape, dtype, device, seed, method, peers, torch_path, compiled)
    if op == 'bidirectional':
        return bidirectional_candidates(shape, dtype, device, seed, method)
    if op in ('conv', 'bidirectional-conv'):
        return conv_candidates(shape, dtype, device, seed, peers, op != 'conv')
    return norm_candidates(shape, dtype, device, seed)


def input_sets(op, shape, dtype, device) -> int:
    """As many sets of inputs as exceed a GPU's cache."""
    if device.type != 'cuda':
        return 1
    one = least_bytes(op, 'forward', shape, dtype)
    return max(1, min(12, -(-(128 * 2**20) // one)))


def measure(args, device, peers, report, write) -> list[Row]:
    """Every requested combination; each row goes to ``write`` when it is measured."""
    clock = Clock(device, args.seconds)
    hbm, exp = copy_rate(device, clock), exp_rate(device, args.clock)
    report(f'copy: {hbm / 1e12:.2f} TB/s')
    rows = []
    start = time.monotonic()
    for op in args.ops:
        for shape_name, shape in args.shapes.items():
            methods = args.methods if op in ('scan', 'bidirectional') else ['zoh']
            for dtype_name, method in ((t, m) for t in args.dtypes for m in methods):
                if time.monotonic() - start > args.time_limit:
                    report(f'stopped after {args.time_limit:.0f} s; what is missing was not run')
                    return rows
                dtype = DTYPES[dtype_name]
                options = (args.torch_path, args.compiled_peers)
                sets = [
                    candidates_of(op, shape, dtype, device, seed, method, peers, *options)
                    for seed in range(input_sets(op, shape, dtype, device))
                ]
                errors = None
                if args.errors:
                    errors = Errors(op, shape, dtype, device, 0, method)
                for group in zip(*sets, strict=True):
                    for direction in (
                        'forward',
                        'training-forward',
                        'backward',
                        'forward+backward',
                    ):
                        row = measure_one(
                            op, shape, group, direction, dtype, clock, hbm, exp, errors, args
                        )
                        if row is None:
                            continue
                        names = (op, shape_name, *shape, dtype_name, method, group[0].name)
                        rows.append(Row(*names, direction, *row))
                        write(rows[-1])
                        report(text_of(rows[-1], rows))
                del sets, errors
                gc.collect()
                if device.type == 'cuda':
                    torch.cuda.empty_cache()
    return rows


def measure_one(op, shape, group, direction, dtype, clock, hbm, exp, errors, args):
    """The figures of a row, or None if there is nothing to measure."""
    if direction == 'backward':
        if args.no_backward or group[0].make_backward is None:
            return None
        calls = [candidate.make_backward() for candidate in group]
    elif direction == 'training-forward':
        if args.no_backward or group[0].training_forward is None:
            return None
        calls = [candidate.training_forward for candidate in group]
    elif direction == 'forward+backward':
        if args.no_backward or group[0].both is None:
            return None
        calls = [candidate.both for candidate in group]
    else:
        calls = [candidate.forward for candidate in group]
    median, fastest, slowest = clock(calls)
    size = least_bytes(op, direction, shape, dtype)
    if direction == 'forward+backward':
        size = least_bytes(op, 'forward', shape, dtype) + least_bytes(op, 'backward', shape, dtype)
    seconds = median / 1e6
    number = exponentials(op, shape)
    peak = None
    if direction != 'training-forward':
        peak = peak_memory(group[0], direction == 'backward', clock.device)
    return (
        median,
        fastest,
        slowest,
        size / seconds / 1e9,
        size / hbm / seconds,
        number / exp / seconds if exp and number else None,
        errors.of(group[0], direction) if errors and direction != 'training-forward' else None,
        peak,
    )


def peer_time(row: Row, rows: list[Row]) -> tuple[str, float] | None:
    """Name and factor of the fastest other implementation of a row's measurement."""
    same = [
        r
        for r in rows
        if (r.op, r.shape, r.dtype, r.method) == (row.op, row.shape, row.dtype, row.method)
        and r.direction == row.direction.removeprefix('training-')
        and r.implementation != row.implementation
        and r.implementation not in ('mmvim', 'mmvim-torch')
    ]
    if not same:
        return None
    best = min(same, key=lambda r: r.time)
    return best.implementation, best.time / row.time


def text_of(row: Row, rows: list[Row]) -> str:
    """One line of progress."""
    memory = '' if row.peak_memory is None else f' {row.peak_memory:8.1f} MiB'
    error = '' if row.error is None else f' error {row.error:.1e}'
    return (
        f'{row.op:18} {row.shape:21} {row.dtype:8} {row.method:10} {row.implementation:20} '
        f'{row.direction:16} {row.time:10.1f} us {row.gb_per_s:7.0f} GB/s{memory}{error}'
    )


def table(rows: list[Row]) -> str:
    """Our times and those of the fastest other implementation, one line per measurement."""
    head = ('op', 'shape', 'dtype', 'method', 'pass', 'us', 'HBM', 'exp', 'error', 'MiB', 'others')
    lines = [head]
    for row in rows:
        if row.implementation != 'mmvim':
            continue
        found = peer_time(row, rows)
        percent = [
            '' if share is None else f'{share:.0%}' for share in (row.hbm_share, row.exp_share)
        ]
        lines.append(
            (
                row.op,
                row.shape,
                row.dtype,
                row.method,
                row.direction,
                f'{row.time:.1f}',
                *percent,
                '' if row.error is None else f'{row.error:.1e}',
                '' if row.peak_memory is None else f'{row.peak_memory:.0f}',
                '' if found is None else f'{found[1]:.2f}x {found[0]}',
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return '\n'.join(
        '  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


@contextlib.contextmanager
def csv_writer(path: Path | None, machine: dict[str, str]) -> Iterator[Callable[[Row], None]]:
    """Give the function that writes a row, with the machine in it."""
    names = [f.name for f in fields(Row)]
    with open_rows(path, [*names, *machine]) as write:

        def write_row(row: Row) -> None:
            write({**asdict(row), **machine})

        yield write_row


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Read a file of :func:`csv_writer`."""
    rows, machine = [], {}
    with path.open(newline='') as file:
        for line in csv.DictReader(file):
            values = {}
            for f in fields(Row):
                text = line.pop(f.name)
                if f.type is int:
                    values[f.name] = int(text)
                elif f.type is str:
                    values[f.name] = text
                else:
                    values[f.name] = float(text) if text else None
            rows.append(Row(**values))
            machine = line
    return rows, machine


def write_plot(path: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Factors over the fastest other implementation, a panel for each op.

    Raises:
        ValueError: If no other implementation was measured.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    panels = {}
    for row in rows:
        found = peer_time(row, rows) if row.implementation == 'mmvim' else None
        if found is None or row.direction == 'training-forward' or row.method != 'zoh':
            continue
        panels.setdefault((row.op, row.dtype, found[0]), {}).setdefault(row.shape, {})[
            row.direction
        ] = found[1]
    if not panels:
        raise ValueError('there is nothing to plot: no op was measured beside another one')
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 3 * len(panels)), squeeze=False, layout='constrained'
    )
    for axis, ((op, dtype, other), shapes) in zip(axes[:, 0], panels.items(), strict=True):
        places = range(len(shapes))
        for offset, direction, color in ((-0.2, 'forward', 'C0'), (0.2, 'backward', 'C1')):
            values = [shapes[s].get(direction, 0) for s in shapes]
            bars = axis.bar(
                [p + offset for p in places], values, 0.38, color=color, label=direction
            )
            axis.bar_label(bars, fmt='%.1f', fontsize=7)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.margins(y=0.15)
        axis.set_xticks(list(places), list(shapes), rotation=20, ha='right', fontsize=8)
        axis.set_ylabel('times as fast')
        axis.set_title(f'{op}, {dtype}: mmvim against {other}', fontsize=10)
        axis.legend(fontsize=8)
    figure.suptitle(', '.join(machine.values()), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None)
    plt.close(figure)


def machine_of(device: torch.device) -> dict[str, str]:
    """The conditions of the measurements."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'CPU ({torch.get_num_threads()} threads, {backend_info()["cpu_instruction_set"]})'
    cuda = f'CUDA {torch.version.cuda}' if device.type == 'cuda' else 'no CUDA'
    return {'device': name, 'torch': f'torch {torch.__version__}', 'cuda': cuda}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, completed and checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--ops', nargs='+', choices=OPS, default=list(OPS))
    parser.add_argument(
        '--shapes',
        nargs='+',
        metavar='NAME',
        help=f'built in: {", ".join([*SHAPES, *CPU_SHAPES])}; or BxDxLxN, such as 8x384x197x16',
    )
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, help='default: bfloat16, on a CPU float32'
    )
    parser.add_argument(
        '--methods', nargs='+', choices=[*DISCRETIZATIONS, 'all'], default=['zoh'],
        help='discretizations of the scans',
    )  # fmt: skip
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--peer', action='append', default=[], metavar='NAME=FILE',
        help=f'compiled module of {", ".join(PEERS)}; default: what can be imported',
    )  # fmt: skip
    parser.add_argument('--no-peers', action='store_true', help='measure mmvim alone')
    parser.add_argument(
        '--compiled-peers', action='store_true',
        help='on a CPU, peers through torch.compile as well (a minute each)',
    )  # fmt: skip
    parser.add_argument('--torch-path', action='store_true', help='the PyTorch path of scans, too')
    parser.add_argument('--no-backward', action='store_true')
    parser.add_argument('--errors', action='store_true', help='compare with float64')
    parser.add_argument('--seconds', type=float, default=0.05, help='for each measurement, about')
    parser.add_argument('--time-limit', type=float, default=3600.0, help='seconds in total')
    parser.add_argument('--clock', type=float, default=1.755, help='GHz, for the share of exp')
    parser.add_argument('--csv', type=Path, help='write all measurements here')
    parser.add_argument('--plot', type=Path, help='draw factors over the fastest peer (.svg, .png)')
    parser.add_argument('--from-csv', type=Path, help='measure nothing: table and plot of a CSV')
    args = parser.parse_args(argv)
    on_cpu = torch.device(args.device).type == 'cpu'
    args.dtypes = args.dtypes or ['float32' if on_cpu else 'bfloat16']
    known = {**SHAPES, **CPU_SHAPES}
    shapes = {}
    for name in args.shapes or (CPU_SHAPES if on_cpu else SHAPES):
        sizes = known.get(name) or tuple(int(x) for x in name.split('x') if x.isdigit())
        if len(sizes) != 4 or min(sizes) < 1:
            parser.error(f'argument --shapes: {name!r} is neither built in nor BxDxLxN')
        shapes[name] = sizes
    args.shapes = shapes
    if 'all' in args.methods:
        args.methods = list(DISCRETIZATIONS)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse(argv)
    try:
        if args.from_csv is not None:
            rows, machine = read_csv(args.from_csv)
        else:
            device = torch.device(args.device)
            machine = machine_of(device)
            print(', '.join(machine.values()), flush=True)
            peers = None if args.no_peers else find_peers(args.peer)
            with csv_writer(args.csv, machine) as write:
                rows = measure(args, device, peers, lambda line: print(line, flush=True), write)
        print(table(rows))
        if args.plot is not None:
            write_plot(args.plot, rows, machine)
    except (ValueError, OSError, KeyError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
