#!/usr/bin/env python
"""Run a model on videos: python tools/demo/video_demo.py MODEL VIDEOS --out-dir DIR"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from mmvim.apis.inferencers.common import Result
from mmvim.apis.outputs import OutputFolder
from mmvim.apis.videos import VideoWriter, find_videos
from mmvim.cli import analysis, demo
from mmvim.datasets.video import FrameFolder, VideoReader, open_video
from mmvim.errors import SampleError, UserError

JSON = 'predictions.json'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Classify, detect or segment videos frame by frame, or, with a model whose '
        'pipeline reads videos, classify them as a whole. Writes drawn videos, pictures and JSON, '
        'or shows the frames.'
    )
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('videos', nargs='+', help='files, folders, or patterns in quotes')
    parser.add_argument('--out-dir', type=Path, help=f'gets *.mp4 and {JSON}')
    parser.add_argument('--no-video', action='store_true', help='write no drawn video')
    parser.add_argument('--pictures', action='store_true', help='write drawn frames as PNG too')
    parser.add_argument('--every', type=int, default=1, metavar='N', help='use each N-th frame')
    parser.add_argument('--max-frames', type=int, metavar='N', help='use N frames at most')
    demo.add_arguments(parser)
    return parser.parse_args()


class Output:
    """Destination of the drawn frames of one video."""

    def __init__(
        self, args: argparse.Namespace, out: OutputFolder | None, stem: str, rate: float
    ) -> None:
        self.out, self.stem, self.show = out, stem, args.show
        self.pictures = bool(out) and args.pictures
        self.name = None if out is None or args.no_video else f'{stem}.mp4'
        self.writer = VideoWriter(out.path(self.name), rate) if self.name else None
        self.wants = bool(self.writer or self.pictures or self.show)

    def __call__(self, number: int, picture: np.ndarray) -> bool:
        """Take one RGB frame; returns whether to go on."""
        if self.writer:
            self.writer.write(picture)
        if self.pictures:
            name = f'vis/{self.stem}/{number:06d}.png'
            Image.fromarray(picture).save(self.out.path(name))
        return not self.show or show(picture)

    def close(self) -> None:
        """Finish the video."""
        if self.writer:
            self.writer.close()


def show(picture: np.ndarray) -> bool:
    """Show a frame in a window; False when q was pressed."""
    import cv2

    try:
        cv2.imshow('mmvim', picture[..., ::-1])
        return cv2.waitKey(1) != ord('q')
    except cv2.error as error:
        raise UserError(f'--show: no window can be opened here ({error.err})') from error


def used_frames(
    video: VideoReader | FrameFolder, args: argparse.Namespace
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Number, time in seconds, and RGB pixels of the frames that are used."""
    times = video.timestamps
    for number, frame in itertools.islice(enumerate(video), 0, None, args.every):
        if args.max_frames is not None and number >= args.every * args.max_frames:
            return
        yield number, float(times[min(number, len(times) - 1)]), frame


def count_frames(video: VideoReader | FrameFolder, args: argparse.Namespace) -> int:
    """Number of these frames."""
    return min(-(-len(video) // args.every), args.max_frames or len(video))


def readable(number: int, name: str, template: str | None, failures: demo.Failures) -> bool:
    """Whether all frames of a video can be read; else its error is taken note of."""
    try:
        with open_video(name, frame_template=template) as video:
            for _ in video:
                pass
    except SampleError as error:
        failures(number, error)
    return number not in failures


def batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of ``size`` items; the last one may be shorter."""
    while part := list(itertools.islice(items, size)):
        yield part


def by_frame(
    inferencer: Any, video: Any, args: argparse.Namespace, output: Output, step: Callable
) -> dict[str, Any]:
    """Run an image model on each frame."""
    frames = []
    for part in batches(used_frames(video, args), args.batch_size):
        images = [np.ascontiguousarray(frame[..., ::-1]) for _, _, frame in part]
        results = inferencer.predict(images, args.batch_size)
        for (number, time, _), result in zip(part, results, strict=True):
            found = {k: v for k, v in result.prediction.items() if k != 'image'}
            frames.append({'frame': number, 'time': round(time, 4), **found})
            step()
            if output.wants and not output(number, inferencer.draw(result)):
                return {'frames': frames}
    return {'frames': frames}


def whole(
    inferencer: Any, result: Result, video: Any, args: argparse.Namespace, output: Output
) -> dict[str, Any]:
    """Draw what a video model says about the whole video over its frames."""
    if output.wants:
        for number, _, frame in used_frames(video, args):
            if not output(number, inferencer.draw(result, frame)):
                break
    return {'classes': result.prediction['classes']}


def run(args: argparse.Namespace) -> None:
    """Run as the command line says."""
    from rich.progress import Progress

    from mmvim.apis.inferencers import VideoInferencer

    demo.check_arguments(args)
    for name in ('every', 'max_frames'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} must be at least 1, not {value}')
    cfg = analysis.config_of(args.model, args)
    videos = find_videos(args.videos)
    stems = demo.unique_stems(videos)
    names = [JSON, *(f'{stem}.mp4' for stem in stems if not args.no_video)]
    names += [f'vis/{stem}' for stem in stems if args.pictures]
    with contextlib.ExitStack() as stack:
        out = None
        if args.out_dir:
            out = stack.enter_context(OutputFolder(args.out_dir, names, args.overwrite))
        inferencer = demo.make_demo_inferencer(args, cfg)
        progress = stack.enter_context(Progress(transient=True, disable=args.no_progress))
        template = getattr(inferencer, 'frame_template', None)
        is_whole = isinstance(inferencer, VideoInferencer)
        failures = demo.Failures(args, len(videos))
        if args.skip_failures:
            kept = [readable(i, name, template, failures) for i, name in enumerate(videos)]
            videos, stems = (list(itertools.compress(x, kept)) for x in (videos, stems))
            failures.report()
        results = inferencer.predict(videos, args.batch_size) if is_whole else None
        predictions = []
        for name, stem in zip(videos, stems, strict=True):
            with open_video(name, frame_template=template) as video:
                total = count_frames(video, args)
                task = progress.add_task(stem, total=1 if is_whole else total)
                rate = (len(video) - 1) / max(video.timestamps[-1], 1e-3) or 25
                output = Output(args, out, stem, min(max(rate / args.every, 1), 120))
                with contextlib.closing(output):
                    if is_whole:
                        prediction = whole(inferencer, next(results), video, args, output)
                        line = demo.summary(prediction, inferencer)
                        progress.advance(task)
                    else:
                        prediction = by_frame(
                            inferencer, video, args, output, lambda t=task: progress.advance(t)
                        )
                        used = prediction['frames']
                        line = f'{len(used)} frames; the last: {demo.summary(used[-1], inferencer)}'
            drawn = {'drawn': str(out.final(output.name))} if output.name else {}
            predictions.append({'video': name, **drawn, **prediction})
            print(f'{name}: {line}')
        if out:
            out.path(JSON).write_text(json.dumps(predictions, indent=2) + '\n')
    if out:
        print(f'{len(predictions)} videos: {out.final(JSON)}')


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with analysis.one_line_errors():
        run(args)


if __name__ == '__main__':
    main()
