#!/usr/bin/env python3
"""Time whole models: images (or clips) a second, latency and memory, in inference and training.

    python tools/benchmark/models.py                                    # every built-in model
    python tools/benchmark/models.py --models vim-t mambavision-t --modes inference
    python tools/benchmark/models.py --models mambavision-t --peers mambavision --csv models.csv
    python tools/benchmark/models.py --models vim-t --sizes 224 512 1024 --plot sizes.svg
    python tools/benchmark/models.py --models vim-t --profile parts.svg   # where the time goes
    python tools/benchmark/models.py --models vim-t mask-rcnn-vim-t --runs launcher launcher-graph
    python tools/benchmark/models.py --read models.csv --plot sizes.svg   # draw what was measured

Weights and inputs are random and stay on the device, so neither a data pipeline nor a checkpoint is
timed. Inference is one forward pass under autocast without gradients; a training step is forward,
cross-entropy, backward and AdamW. `graph` captures either in a CUDA graph, `compile` passes the
model through `torch.compile`, `compile-graph` with `mode='reduce-overhead'`. `launcher` is
tools/train.py with the model's config on batches that cost nothing (the mean over its iterations,
optimizer, augmentation of batches, averages and logging included), `launcher-graph` the same with
`graph=True`, `launcher-compile` with `compile=True`; it also says how many kernels an iteration
has, by part how long they take, and which of the rest take longest. Times are medians over single
passes, measured with CUDA events (the clock on a CPU). The host's time is that until a call returns
which finds the GPU idle; with --batch 1 --sizes 64 the GPU has next to nothing to do, and never
makes the host wait. `GiB` is the peak of what PyTorch had allocated after warm-up, weights and the
memory of CUDA graphs included. With --sizes the batch shrinks as the image grows: the pixels of a
batch stay the same. A table is written row by row: a run that is stopped leaves what it has
measured, for --read to draw.

Peers are other packages' models, measured in the same run when they can be imported:
`mambavision` (the official package, which needs `mamba_ssm`; `--peer-path` adds folders to the
import path), `timm` models of similar size, and for inference on a CPU `mambapy`'s bidirectional
stack and our model on `mamba_ssm`'s reference scan (`mamba_ssm_ref`). `mamba_ssm` is VMamba in the
steps that its authors document, on `mamba_ssm`'s kernels (tools/benchmark/cross_scan.py); where a
package has two peers of a model, `timm-convnext` is the second.
"""

import argparse
import contextlib
import csv
import gc
import importlib
import itertools
import math
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import describe, open_rows, positive
from torch import Tensor, nn
from torch.nn import functional as F

import mmvim
from mmvim.errors import UserError
from mmvim.ops import intercept_ops

CLASSES = 1000
DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
MODES = ('inference', 'training')
RUNS = (
    'eager', 'compile', 'compile-graph', 'graph',
    'launcher', 'launcher-graph', 'launcher-compile',
)  # fmt: skip


Builder = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Case:
    """A model with its usual batch: `build(side)` makes it, `shape` is one sample's.

    `config` is what the launcher trains; detectors and segmentors have nothing else.
    """

    build: Builder | None
    batch: int
    shape: tuple[int, ...]
    channels_last: bool = False
    config: str = ''


class Classifier(nn.Module):
    """A backbone and the linear layer that classifiers put on its pooled features."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, …) images or clips to (batch, classes)."""
        return self.head(self.backbone(x)[-1])


def _vim(arch: str, features: int) -> Builder:
    return lambda side: Classifier(mmvim.Vim(arch=arch, img_size=side), features)


def _videomamba(arch: str, features: int, **options) -> Builder:
    return lambda side: Classifier(mmvim.VideoMamba(arch=arch, img_size=side, **options), features)


def _mambavision(arch: str, features: int) -> Builder:
    # Without drop path: the official code takes the rate and then ignores it.
    return lambda _: Classifier(mmvim.MambaVision(arch=arch, drop_path_rate=0.0), features)


def _official_mambavision(name: str) -> Builder:
    return lambda _: importlib.import_module('mambavision').create_model(name, pretrained=False)


def _vmamba(arch: str, features: int) -> Builder:
    def build(_: int) -> nn.Module:
        model = Classifier(mmvim.VMamba(arch=arch, drop_path_rate=0.0), features)
        return model.to(memory_format=torch.channels_last)

    return build


def _vmamba_on_mamba_ssm(arch: str, features: int) -> Builder:
    """The same model in the steps and on the norms of its authors: SS2D layers copy the map."""

    def build(_: int) -> nn.Module:
        from cross_scan import MambaSsmScan, OnMambaSsm

        MambaSsmScan.module = importlib.import_module('selective_scan_cuda')
        model = Classifier(mmvim.VMamba(arch=arch, drop_path_rate=0.0), features)
        for layer in model.modules():
            if isinstance(layer, mmvim.layers.SS2D):
                layer.__class__ = OnMambaSsm
            elif isinstance(layer, nn.LayerNorm):
                layer.__class__ = nn.LayerNorm
            layer.fused = False  # of ours
        return model

    return build


def _convnext(name: str) -> Builder:
    return lambda _: importlib.import_module('timm').create_model(name, pretrained=False)


def _timm(name: str) -> Builder:
    return lambda side: importlib.import_module('timm').create_model(
        name, pretrained=False, img_size=side
    )


def _mambapy(features: int, depth: int) -> Builder:
    """mambapy's bidirectional stack between our patch embedding and a head; no class token."""

    def build(side: int) -> nn.Module:
        vim = importlib.import_module('mambapy.vim')
        vit = mmvim.Vim(arch=dict(embed_dims=features, depth=depth), img_size=side)
        stack = vim.VMamba(vim.MambaConfig(d_model=features, n_layers=depth))
        return Sequence(vit.patch_embed, stack, features)

    return build


class Sequence(nn.Module):
    """Patch embedding, a stack over tokens, mean, head."""

    def __init__(self, patch_embed: nn.Module, stack: nn.Module, features: int) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.stack = stack
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images to classes."""
        return self.head(self.stack(self.patch_embed(x)[0]).mean(1))


def _on_reference_scan(build: Builder) -> Builder:
    """The same model, whose scans are mamba_ssm's reference implementation in PyTorch."""

    def reference(_, *inputs) -> tuple[Tensor]:
        interface = importlib.import_module('mamba_ssm.ops.selective_scan_interface')
        z, scale, delta_softplus = inputs[14:17]
        total = 0
        for start, reverse in ((0, False), (7, True)):
            u, delta, a, b, c, skip, delta_bias = inputs[start : start + 7]
            u, delta, b, c = (
                (x.flip(1) if reverse else x).transpose(1, 2)
                for x in (u, delta, b.squeeze(2), c.squeeze(2))
            )
            y = interface.selective_scan_ref(
                u, delta, a, b, c, skip, None, delta_bias, delta_softplus
            ).transpose(1, 2)
            total = total + (y.flip(1) if reverse else y)
        return (scale * total * F.silu(z),)

    class OnReference(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with intercept_ops(bidirectional_scan=reference):
                return self.model(x)

    def wrapped(side: int) -> nn.Module:
        importlib.import_module('mamba_ssm.ops.selective_scan_interface')
        return OnReference(build(side))

    return wrapped


IMAGE = (3, 224, 224)
VMAMBA = {
    't': ('tiny', 768), 't-s2l5': ('tiny-s2l5', 768), 's': ('small', 768), 'b': ('base', 1024),
    'vanilla-t': ('vanilla-tiny', 768),
}  # fmt: skip
MODELS = {
    'vim-t': Case(_vim('tiny', 192), 128, IMAGE, config='vim/vim-tiny_8xb128_in1k'),
    'vim-s': Case(_vim('small', 384), 128, IMAGE, config='vim/vim-small_8xb64_in1k'),
    'vim-b': Case(_vim('base', 768), 64, IMAGE, config='vim/vim-base_8xb128_in1k'),
    'vim-t-1024': Case(_vim('tiny', 192), 2, (3, 1024, 1024)),
    'videomamba-t': Case(
        _videomamba('tiny', 192), 128, IMAGE, config='videomamba/videomamba-tiny_8xb512_in1k'
    ),
    'videomamba-t-8x224': Case(_videomamba('tiny', 192, num_frames=8), 32, (3, 8, 224, 224)),
    'videomamba-m-16x224': Case(_videomamba('middle', 576, num_frames=16), 8, (3, 16, 224, 224)),
    'mambavision-t': Case(
        _mambavision('tiny', 640), 128, IMAGE, True, 'mambavision/mambavision-tiny_32xb128_in1k'
    ),
    'mambavision-s': Case(
        _mambavision('small', 768), 128, IMAGE, True, 'mambavision/mambavision-small_32xb128_in1k'
    ),
    'mambavision-b': Case(
        _mambavision('base', 1024), 128, IMAGE, True, 'mambavision/mambavision-base_32xb128_in1k'
    ),
    **{
        f'vmamba-{name}': Case(
            _vmamba(arch, features), 128, IMAGE, config=f'vmamba/vmamba-{arch}_8xb128_in1k'
        )
        for name, (arch, features) in VMAMBA.items()
    },
    'vmamba-t-1024': Case(_vmamba('tiny', 768), 2, (3, 1024, 1024)),
    'mask-rcnn-vim-t': Case(
        None, 2, (3, 1024, 1024), config='vim/mask-rcnn_vim-tiny_simplefpn_1x_coco'
    ),
    'mask-rcnn-mambavision-t': Case(
        None, 2, (3, 1024, 1024), config='mambavision/mask-rcnn_mambavision-tiny_fpn_1x_coco'
    ),
    'mask-rcnn-vmamba-t': Case(
        None, 2, (3, 1024, 1024), config='vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco'
    ),
    'mask-rcnn-r50': Case(
        None, 2, (3, 1024, 1024), config='mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    ),
    'upernet-vim-t': Case(
        None, 2, (3, 512, 512), config='vim/vim-tiny_upernet_8xb2-160k_ade20k-512x512'
    ),
    'upernet-mambavision-t': Case(
        None,
        2,
        (3, 512, 512),
        config='mambavision/mambavision-tiny_upernet_8xb2-160k_ade20k-512x512',
    ),
    'upernet-vmamba-t': Case(
        None, 2, (3, 512, 512), config='vmamba/vmamba-tiny_upernet_8xb2-160k_ade20k-512x512'
    ),
}
PEERS = {
    'mambavision': {
        'mambavision-t': _official_mambavision('mamba_vision_T'),
        'mambavision-s': _official_mambavision('mamba_vision_S'),
        'mambavision-b': _official_mambavision('mamba_vision_B'),
    },
    'mambapy': {'vim-t': _mambapy(192, 24)},
    'mamba_ssm_ref': {'vim-t': _on_reference_scan(_vim('tiny', 192))},
    'mamba_ssm': {
        **{
            f'vmamba-{name}': _vmamba_on_mamba_ssm(arch, features)
            for name, (arch, features) in VMAMBA.items()
        },
        'vmamba-t-1024': _vmamba_on_mamba_ssm('tiny', 768),
    },
    'timm-convnext': {'vmamba-t': _convnext('convnext_tiny')},
    'timm': {
        'vmamba-t': _timm('swin_tiny_patch4_window7_224'),
        'vmamba-t-1024': _timm('swin_tiny_patch4_window7_224'),
        'vim-t': _timm('deit_tiny_patch16_224'),
        'vim-s': _timm('deit_small_patch16_224'),
        'vim-b': _timm('deit_base_patch16_224'),
        'vim-t-1024': _timm('deit_tiny_patch16_224'),
        'mambavision-t': _timm('swin_tiny_patch4_window7_224'),
    },
}


@dataclass(frozen=True)
class Row:
    """One line of the table; `rate` in samples a second, `milliseconds` and `host` per pass."""

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
    kernels: int = 0
    host: float = float('nan')


def main() -> int:
    """Measure, print and write."""
    args = parse_args()
    if args.read:
        return draw(args)
    for folder in args.peer_path:
        sys.path.insert(0, folder)
    device = torch.device(args.device)
    print(describe(device), flush=True)
    if args.profile:
        return profile(args, device)
    rows = []
    names = [field.name for field in fields(Row)]
    with open_rows(args.csv, names, describe(device)) as write:
        for row in measure_all(args, device):
            rows.append(row)
            write(asdict(row))
            print(line(row), flush=True)
    if args.csv:
        print(f'written: {args.csv}')
    if args.plot:
        draw_sizes(args.plot, rows, describe(device))
        print(f'written: {args.plot}')
    return int(any(row.note for row in rows))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=MODELS, metavar='M',
                        help=f'default: all of {", ".join(MODELS)}')  # fmt: skip
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--runs', nargs='+', choices=RUNS, default=['eager'])
    parser.add_argument('--dtype', choices=DTYPES, default='bfloat16', help='of autocast')
    parser.add_argument('--batch', type=positive, help='instead of each model’s usual batch')
    parser.add_argument('--sizes', nargs='+', type=positive, metavar='N', default=[None],
                        help='pixels of an image side, instead of the usual one')  # fmt: skip
    parser.add_argument('--peers', nargs='*', choices=PEERS, default=[])
    parser.add_argument('--peer-path', nargs='*', default=[], metavar='FOLDER')
    parser.add_argument('--repeats', type=positive, default=20)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--csv', type=Path, help='write the rows (with --profile the parts) here')
    parser.add_argument('--plot', type=Path, help='draw rate and memory against --sizes')
    parser.add_argument('--profile', type=Path,
                        help='time the kernels by part: a picture, or a .csv')  # fmt: skip
    parser.add_argument('--read', type=Path, help='draw this .csv instead of measuring')
    args = parser.parse_args()
    if 'graph' in args.runs and not args.device.startswith('cuda'):
        parser.error(f'--runs graph needs a CUDA device, got --device {args.device}')
    if args.read:
        if not (args.plot or args.profile):
            parser.error('--read needs --plot or --profile')
        return args
    if args.profile and not args.device.startswith('cuda'):
        parser.error(f'--profile needs a CUDA device, got --device {args.device}')
    for name in args.models or ():
        packages = ('mmvim', *(peer for peer in args.peers if name in PEERS[peer]))
        wanted = itertools.product(packages, args.runs, args.modes)
        if not args.profile and not any(runs(MODELS[name], *each) for each in wanted):
            parser.error(
                f'{name} has no run of --runs {" ".join(args.runs)} in --modes '
                f'{" ".join(args.modes)}: the launcher trains models with a config, and detectors '
                'and segmentors run through it alone'
            )
    args.models = args.models or list(MODELS)
    return args


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Every wanted model at every size, mmvim's first, then its peers."""
    for name, side in itertools.product(args.models, args.sizes):
        case = MODELS[name]
        builders = {'mmvim': case.build}
        builders |= {peer: PEERS[peer][name] for peer in args.peers if name in PEERS[peer]}
        shape, batch = sized(case, side, args.batch)
        for package, build in builders.items():
            for run, mode in itertools.product(args.runs, args.modes):
                if not runs(case, package, run, mode):
                    continue
                labels = (name, package, mode, run, args.dtype, batch)
                size = 'x'.join(map(str, shape[1:]))
                kernels, host = 0, float('nan')
                try:
                    if run.startswith('launcher'):
                        seconds, gib, kernels = launch(name, (batch, *shape), run, args)
                    else:
                        seconds, gib, host = measure(
                            build, (batch, *shape), mode, run, case.channels_last, args, device
                        )
                except (ImportError, RuntimeError, TypeError, UserError, ValueError) as error:
                    reason = str(error).splitlines()[0] if str(error) else repr(error)
                    nothing = float('nan')
                    yield Row(*labels, size, nothing, nothing, nothing, reason[:160])
                    continue
                finally:
                    release(device)
                yield Row(
                    *labels, size, batch / seconds, 1e3 * seconds, gib, '', kernels, 1e3 * host
                )


def runs(case: Case, package: str, run: str, mode: str) -> bool:
    """Whether there is such a run of a model."""
    if run.startswith('launcher'):
        return bool(case.config) and package == 'mmvim' and mode == 'training'
    return case.build is not None or package != 'mmvim'


def launch(
    name: str, shape: tuple[int, ...], run: str, args: argparse.Namespace
) -> tuple[float, float, int]:
    """Mean seconds of an iteration of tools/train.py, peak GiB and number of kernels.

    Raises:
        ValueError: If the training fails.
    """
    import json
    import tempfile

    import scaling
    from mmengine.config import Config

    config = MODELS[name].config
    if '::' in config:
        from mmengine.hub import get_config

        cfg = get_config(config)
    else:
        cfg = Config.fromfile(Path(__file__).parents[2] / 'configs' / f'{config}.py')
    option = run.partition('-')[2]
    if option:
        cfg[option] = True
    wanted = argparse.Namespace(
        size=shape[-1], warm_up=max(10, args.repeats), iterations=args.repeats, config=config
    )
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / 'config.py', Path(folder) / 'out.json'
        scaling.synthetic(cfg, shape[0], 1, wanted, out, profiled=2).dump(path)
        scaling.train(path, None, args.dtype)
        result = json.loads(out.read_text())
    kernels = result.get('kernels', {})
    times = dict.fromkeys((*PARTS, REST), 0.0)
    for kernel, (_, milliseconds) in kernels.items():
        times[part_of(kernel)] += milliseconds
    if kernels:
        print(line_of_parts(f'{name}, {run}', times), flush=True)
        print(*lines_of_rest(kernels), sep='\n', flush=True)
    count = round(sum(number for number, _ in kernels.values()))
    return result['seconds'] / args.repeats, result.get('gib', float('nan')), count


def sized(case: Case, side: int | None, batch: int | None) -> tuple[tuple[int, ...], int]:
    """Shape of a sample with that side, and a batch of as many pixels as the usual one."""
    if side is None:
        return case.shape, batch or case.batch
    shape = (*case.shape[:-2], side, side)
    pixels = case.batch * case.shape[-1] * case.shape[-2]
    return shape, batch or max(1, round(pixels / side**2))


def measure(
    build: Builder,
    shape: tuple[int, ...],
    mode: str,
    run: str,
    channels_last: bool,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[float, float, float]:
    """Median seconds of a pass, peak GiB, and median seconds of the host (see `host_time`)."""
    step = make_step(build, shape, mode, run, channels_last, DTYPES[args.dtype], device)
    for _ in range(min(5, args.repeats)):
        step()
    if device.type == 'cuda' and run != 'graph':
        torch.cuda.reset_peak_memory_stats(device)
    return timed(step, args.repeats, device), peak(device), host_time(step, args.repeats, device)


def make_step(
    build: Builder,
    shape: tuple[int, ...],
    mode: str,
    run: str,
    channels_last: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], None]:
    """One pass of a new model."""
    torch.manual_seed(0)
    model = build(shape[-1]).to(device).train(mode == 'training')
    inputs = torch.randn(shape, device=device)
    if channels_last and inputs.dim() == 4 and device.type == 'cuda':
        model, inputs = (x.to(memory_format=torch.channels_last) for x in (model, inputs))
    network = model
    if run.startswith('compile'):
        network = torch.compile(model, mode='reduce-overhead' if run.endswith('graph') else None)
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

    return captured(step) if run == 'graph' else step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, after warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    # What a graph needs is allocated while it is captured.
    torch.cuda.reset_peak_memory_stats()
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


def host_time(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median seconds until a call returns that finds the GPU idle; not known on a CPU."""
    if device.type != 'cuda':
        return float('nan')
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(times)


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
        # cuBLAS keeps a workspace for every stream that a graph was captured on.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def line(row: Row) -> str:
    """A row of the table."""
    head = (
        f'{row.model:20} {row.package:12} {row.mode:10} {row.run:16} {row.batch:4} x {row.size:12}'
    )
    if row.note:
        return f'{head} failed: {row.note}'
    kernels = f' {row.kernels:6} kernels' if row.kernels else ''
    host = '' if math.isnan(row.host) else f' {row.host:8.2f} ms of the host'
    return f'{head} {row.rate:10.1f}/s {row.milliseconds:9.2f} ms {row.gib:7.2f} GiB{kernels}{host}'


def draw(args: argparse.Namespace) -> int:
    """Draw what an earlier run has written."""
    head, *lines = args.read.read_text().splitlines()
    table = list(csv.DictReader(lines))
    if not table:
        print(f'error: {args.read} has no rows', file=sys.stderr)
        return 1
    if args.plot:
        numbers = {'batch': int, 'kernels': int}
        numbers |= dict.fromkeys(('rate', 'milliseconds', 'gib', 'host'), float)
        rows = [Row(**{k: numbers.get(k, str)(v) for k, v in row.items()}) for row in table]
        draw_sizes(args.plot, rows, head)
    if args.profile:
        parts = {row.pop('model'): {k: float(v) for k, v in row.items()} for row in table}
        draw_parts(args.profile, parts, head)
    return 0


# Parts of a step by names of kernels; the first that matches counts.
PARTS = {
    'scan': r'mmvim::scan|selective_scan|mmvim::cross',
    'convolution': r'mmvim::conv|conv|implicit_gemm|wgrad|dgrad',
    'attention': r'sdpa|flash|fmha',
    'norm': r'norm',
    'optimizer': r'FusedOptimizer|multi_tensor_apply',
    'matrix products': r'gemm|nvjet|cutlass|cublas|splitK',
}
REST = 'elementwise'
# Kernels of the rest that the launcher's runs name.
NAMED = 8
# Few: a pass has thousands of events, and PyTorch needs 0.1 ms or more to read each of them.
PROFILED = 5


def profile(args: argparse.Namespace, device: torch.device) -> int:
    """Print, write and draw the time by part of each model."""
    table = args.profile if args.profile.suffix == '.csv' else args.csv
    parts = {}
    with open_rows(table, ['model', *PARTS, REST], describe(device)) as write:
        for name, times in profile_all(args, device):
            parts[name] = times
            write({'model': name, **times})
            print(line_of_parts(name, times), flush=True)
    if args.profile != table:
        draw_parts(args.profile, parts, describe(device))
    return 0


def profile_all(
    args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, dict[str, float]]]:
    """Milliseconds that the kernels of each part take in a step of each model."""
    repeats = min(PROFILED, args.repeats)
    for name, mode in itertools.product(args.models, args.modes):
        case = MODELS[name]
        if case.build is None:
            continue
        shape, batch = sized(case, args.sizes[0], args.batch)
        step = make_step(
            case.build, (batch, *shape), mode, 'eager', case.channels_last, DTYPES[args.dtype],
            device,
        )  # fmt: skip
        for _ in range(5):
            step()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(repeats):
                step()
            torch.cuda.synchronize(device)
        times = dict.fromkeys((*PARTS, REST), 0.0)
        for event in profiler.key_averages():
            times[part_of(event.key)] += event.self_device_time_total / repeats / 1e3
        del step
        release(device)
        yield f'{name}, {mode}', times


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to."""
    found = (part for part, pattern in PARTS.items() if re.search(pattern, kernel))
    return next(found, REST)


def line_of_parts(name: str, times: dict[str, float]) -> str:
    """Milliseconds by part."""
    shares = ', '.join(f'{part} {time:.2f}' for part, time in times.items() if time > 0)
    return f'{name:32} {sum(times.values()):8.2f} ms of kernels: {shares}'


def lines_of_rest(kernels: dict[str, tuple[float, float]]) -> list[str]:
    """The kernels that take most of the time of no part: milliseconds, number and name of each."""
    rest = ((name, *what) for name, what in kernels.items() if part_of(name) == REST)
    largest = sorted(rest, key=lambda kernel: -kernel[2])[:NAMED]
    return [
        f'    {milliseconds:7.2f} ms {number:6.1f} x  {short_name(name)}'
        for name, number, milliseconds in largest
    ]


def short_name(kernel: str) -> str:
    """The name of a kernel without what all of them have."""
    kernel = re.sub(
        r'^void |\(anonymous namespace\)::|at::native::|(?<=\})::operator\(\)\(\) const', '', kernel
    )
    return kernel[:160]


def draw_parts(path: Path, parts: dict[str, dict[str, float]], title: str) -> None:
    """Draw the share of each part."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.4 * len(parts)), layout='constrained')
    names, left = list(parts)[::-1], [0.0] * len(parts)
    totals = [sum(parts[name].values()) for name in names]
    for part in (*PARTS, REST):
        widths = [
            100 * parts[name][part] / total for name, total in zip(names, totals, strict=True)
        ]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(totals):
        axes.text(101, i, f'{total:.1f} ms', va='center')
    axes.set(xlim=(0, 112), xlabel="share of the kernels' time, %")
    set_title(figure, title)
    figure.legend(loc='outside lower center', ncols=4)
    figure.savefig(path)
    plt.close(figure)


def draw_sizes(path: Path, rows: list[Row], title: str) -> None:
    """Draw rate and memory against the side of the image."""
    from matplotlib import pyplot as plt

    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        if not row.note:
            lines.setdefault((row.mode, row.model, row.package, row.run), []).append(row)
    modes = list(dict.fromkeys(mode for mode, *_ in lines))
    figure, grid = plt.subplots(
        2, len(modes), figsize=(5 * len(modes), 7), sharex=True, squeeze=False, layout='constrained'
    )
    for (mode, model, package, run), group in lines.items():
        column = grid[:, modes.index(mode)]
        sides = [int(row.size.rpartition('x')[2]) for row in group]
        label = f'{model if package == "mmvim" else f"{package} (beside {model})"}, {run}'
        column[0].plot(sides, [row.rate for row in group], marker='o', label=label)
        column[1].plot(sides, [row.gib / row.batch for row in group], marker='o', label=label)
    for mode, column in zip(modes, grid.T, strict=True):
        column[0].set(title=mode, yscale='log', ylabel='samples a second')
        column[1].set(ylabel='GiB a sample', xlabel='pixels of a side')
        column[0].legend(fontsize=7)
    set_title(figure, title)
    figure.savefig(path)
    plt.close(figure)


def set_title(figure: object, title: str) -> None:
    """Put the line that names the machine above the figure, in lines that fit it."""
    figure.suptitle(textwrap.fill(title.removeprefix('# '), 100), fontsize=8)


if __name__ == '__main__':
    raise SystemExit(main())
