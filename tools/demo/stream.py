#!/usr/bin/env python3
"""Classify a video while it plays: ``python tools/demo/stream.py CONFIG CHECKPOINT SOURCE``.

SOURCE is a video file or the number of a camera. The model reads the video chunk by chunk, keeps a
state of constant size, and says after each chunk what it takes the video for so far.
"""

import argparse
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from mmvim._configs import type_name
from mmvim.apis.model_zoo import load_config
from mmvim.cli.diagnosis import reported_errors
from mmvim.datasets.video import VideoReader
from mmvim.datasets.video.reader import require_av
from mmvim.errors import UserError
from mmvim.models import GraphedStream

# Arguments of VideoMamba that its streaming form does not take.
NOT_STREAMED = ('out_type', 'out_indices', 'out_norm', 'keep_temporal', 'pool')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of a video classifier')
    parser.add_argument('checkpoint', help="its weights, or 'none' for random ones")
    parser.add_argument('source', help='video file, or the number of a camera')
    parser.add_argument(
        '--mode',
        choices=('causal', 'block', 'lookahead'),
        help='how a VideoMamba backbone is streamed (default: lookahead; causal leaves its '
        "backward direction out); a StreamingVideoMamba keeps its config's mode",
    )
    parser.add_argument('--block-frames', type=int, help='frames of a block (default: --chunk)')
    parser.add_argument(
        '--lookahead-frames', type=int, help='frames of look-ahead (default: num_frames)'
    )
    parser.add_argument(
        '--chunk', type=int, help='frames read at a time (default: one tubelet, or one block)'
    )
    parser.add_argument('--every', type=int, default=1, help='use every n-th frame (default: 1)')
    parser.add_argument('--max-frames', type=int, help='frames used at most (default: all)')
    parser.add_argument('--classes', help='file with a class name a line')
    parser.add_argument('--topk', type=int, default=3, help='classes shown (default: 3)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--graph', action='store_true', help='one launch a chunk: through a CUDA graph'
    )
    parser.add_argument('--out', help='write the video with the predictions drawn, as .mp4')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing --out')
    parser.add_argument('--show', action='store_true', help='show it in a window (q ends)')
    return parser.parse_args(argv)


def read_file(path: str) -> Iterator[np.ndarray]:
    """Frames of a video file, (height, width, 3) uint8 RGB."""
    with VideoReader(path) as video:
        yield from video


def read_camera(index: int) -> Iterator[np.ndarray]:
    """Frames of a camera, (height, width, 3) uint8 RGB."""
    import cv2

    camera = cv2.VideoCapture(index)
    if not camera.isOpened():
        raise UserError(f'there is no camera {index}')
    try:
        while True:
            there, frame = camera.read()
            if not there:
                return
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        camera.release()


def build(args: argparse.Namespace) -> nn.Module:
    """Build the classifier of the config with a streaming backbone."""
    cfg = load_config(args.config)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    backbone = cfg.model.backbone
    kind = type_name(backbone)
    if kind == 'VideoMamba' and backbone.get('num_frames'):
        mode = args.mode or 'lookahead'
        if backbone.get('pool', 'cls') != 'avg':
            print(
                f'note: the head was trained on pool={backbone.get("pool", "cls")!r} and gets the '
                "mean of the tokens, all that a stream has: train with pool='avg', best with a "
                'mmvim.StreamingVideoMamba, to trust the predictions',
                file=sys.stderr,
            )
        frames, tubelet = backbone.num_frames, backbone.get('tubelet_size', 1)
        backbone = {k: v for k, v in backbone.items() if k not in NOT_STREAMED}
        backbone.update(
            type='mmvim.StreamingVideoMamba', stream_mode=mode, beyond='clamp', init_cfg=None
        )
        if mode == 'block':
            backbone['block_frames'] = args.block_frames or args.chunk or frames
        elif mode == 'lookahead':
            given = args.lookahead_frames
            backbone['lookahead_frames'] = frames if given is None else given
        else:
            backbone['drop_backward'] = backbone.get('bimamba', 'v2') == 'v2'
        args.chunk = args.chunk or backbone.get('block_frames') or tubelet
        cfg.model.backbone = backbone
    elif kind == 'StreamingVideoMamba':
        if args.mode not in (None, backbone.get('stream_mode', 'causal')):
            raise UserError(f"--mode {args.mode}: the config's backbone has a mode of its own")
        args.chunk = args.chunk or backbone.get('block_frames') or backbone.get('tubelet_size', 1)
    else:
        raise UserError(
            f'model.backbone.type is {backbone.type!r}; streaming needs a VideoMamba with '
            'num_frames or a StreamingVideoMamba'
        )
    model = MODELS.build(cfg.model)
    width = getattr(model.head, 'in_channels', model.backbone.embed_dims)
    if width != model.backbone.embed_dims:
        raise UserError(
            f'the head takes {width} channels and a stream gives {model.backbone.embed_dims}: '
            "pool='cls_cat_avg' cannot be streamed"
        )
    if args.checkpoint != 'none':
        load_checkpoint(model, args.checkpoint, map_location='cpu')
    return model.eval().to(args.device)


def prepare(frames: list[np.ndarray], model: nn.Module, device: str) -> Tensor:
    """Make a chunk (1, 3, frames, height, width): short side to the model's size, centre cut."""
    clip = torch.from_numpy(np.stack(frames)).to(device).permute(0, 3, 1, 2).float()
    size = model.backbone.img_size
    scale = max(size[0] / clip.shape[2], size[1] / clip.shape[3])
    full = [max(round(s * scale), t) for s, t in zip(clip.shape[2:], size, strict=True)]
    clip = F.interpolate(clip, full, mode='bilinear', antialias=True, align_corners=False)
    top, left = (full[0] - size[0]) // 2, (full[1] - size[1]) // 2
    clip = clip[:, :, top : top + size[0], left : left + size[1]]
    clip = clip.transpose(0, 1).unsqueeze(0)
    mean, std = model.data_preprocessor.mean, model.data_preprocessor.std
    return (clip - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


class Output:
    """Draws predictions into a file, a window, or both."""

    def __init__(self, path: str | None, show: bool) -> None:
        self.path, self.show, self.container = path, show, None
        # The file gets its name when it is complete.
        if path is not None:
            self.partial = str(Path(path).with_name(f'.{uuid.uuid4().hex[:8]}{Path(path).suffix}'))

    def __call__(self, frame: np.ndarray, lines: list[str]) -> bool:
        """Draw one frame; returns whether to go on."""
        if self.path is None and not self.show:
            return True
        import cv2

        picture = np.ascontiguousarray(frame)
        size = max(picture.shape[0] / 480, 0.35)
        for i, line in enumerate(lines):
            place = (6, round((i + 1) * 24 * size))
            for colour, width in (((0, 0, 0), 4), ((255, 255, 255), 1)):
                cv2.putText(
                    picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.7 * size, colour, width,
                    cv2.LINE_AA,
                )  # fmt: skip
        if self.path is not None:
            self._write(picture)
        if self.show:
            cv2.imshow('mmvim', picture[..., ::-1])
            return cv2.waitKey(1) != ord('q')
        return True

    def _write(self, picture: np.ndarray) -> None:
        av = require_av()
        if self.container is None:
            self.container = av.open(self.partial, 'w')
            self.stream = self.container.add_stream('mpeg4', rate=25)
            height, width = (side // 2 * 2 for side in picture.shape[:2])
            self.stream.height, self.stream.width = height, width
            self.stream.pix_fmt, self.stream.bit_rate = 'yuv420p', 4_000_000
        cut = np.ascontiguousarray(picture[: self.stream.height, : self.stream.width])
        frame = av.VideoFrame.from_ndarray(cut, format='rgb24')
        self.container.mux(self.stream.encode(frame))

    def close(self, complete: bool) -> None:
        """Finish the file, or remove what there is of it."""
        if self.container is None:
            return
        if complete:
            self.container.mux(self.stream.encode())
        self.container.close()
        if complete:
            os.replace(self.partial, self.path)
        else:
            os.remove(self.partial)


def describe(scores: Tensor, names: list[str] | None, topk: int) -> list[str]:
    """The best classes and their probabilities, one a line."""
    values, labels = scores.topk(min(topk, len(scores)))
    return [
        f'{value:6.1%}  {names[label] if names else label}'
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]


def run(args: argparse.Namespace) -> int:
    """Stream; returns the number of frames used."""
    for name in ('every', 'topk', 'chunk', 'max_frames'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    if args.out and Path(args.out).exists() and not args.overwrite:
        raise UserError(f'{args.out!r} exists; --overwrite replaces it')
    if args.graph and torch.device(args.device).type != 'cuda':
        raise UserError(f'--graph needs a CUDA device, got --device {args.device}')
    names = Path(args.classes).read_text().splitlines() if args.classes else None
    model = build(args)
    step = GraphedStream(model.backbone) if args.graph else model.backbone
    tubelet = model.backbone.tubelet_size
    if args.chunk % tubelet:
        raise UserError(f'--chunk {args.chunk} is no multiple of tubelet_size={tubelet}')
    frames = read_camera(int(args.source)) if args.source.isdigit() else read_file(args.source)
    output, state = Output(args.out, args.show), model.backbone.init_state(1, args.device)
    waiting: list[np.ndarray] = []
    lines, used, start, complete = ['…'], 0, time.perf_counter(), False

    def say(pooled: Tensor) -> None:
        nonlocal lines
        if not state.count:
            return
        lines = describe(model.head((pooled,))[0].float().softmax(-1), names, args.topk)
        rate = used / (time.perf_counter() - start)
        print(f'frame {used:6d}  {rate:7.1f} frames/s  ' + '  |  '.join(lines), flush=True)

    try:
        with torch.inference_mode():
            for number, frame in enumerate(frames):
                if not number % args.every:
                    waiting.append(frame)
                    used += 1
                    if len(waiting) == args.chunk:
                        clip = prepare(waiting, model, args.device)
                        _, pooled, state = step(clip, state=state)
                        waiting = []
                        say(pooled)
                if not output(frame, lines) or used == args.max_frames:
                    break
            rest = len(waiting) // tubelet * tubelet
            if rest:
                clip = prepare(waiting[:rest], model, args.device)
                _, pooled, state = model.backbone(clip, state=state)
            if used:
                _, pooled, state = model.backbone.flush(state)
                say(pooled)
        complete = True
    except KeyboardInterrupt:
        # How one ends a camera: what was recorded is wanted.
        complete = True
        raise
    finally:
        output.close(complete)
    if not used:
        raise UserError(f'{args.source!r} has no frames')
    return used


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with reported_errors():
        run(args)


if __name__ == '__main__':
    main()
