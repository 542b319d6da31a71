"""Pipeline steps that read and augment clips.

Between the steps a sample holds its clips under 'frames', a uint8 tensor (views, frames, 3,
height, width) in RGB.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dataset import Compose
from mmengine.logging import print_log
from torch import Tensor

from mmvim._arguments import misfits, parameters
from mmvim._checks import check_choice, check_flags, check_number, check_numbers, check_positive
from mmvim.registry import TRANSFORMS

from .errors import VideoSampleError
from .frames import check_template, open_video
from .sampling import at_regular_times, dense_indices, uniform_indices


@contextmanager
def _naming_options(kind: type, options: dict) -> Iterator[None]:
    """Name the option whose type torchvision did not expect, if one may be the cause."""
    try:
        yield
    except Exception as error:
        wrong = misfits(kind, options)
        if not wrong:
            raise
        raise ValueError(f'{kind.__name__}: {", ".join(wrong)} ({error})') from error


@TRANSFORMS.register_module()
class LoadVideo:
    """Read the frames of one or several clips of the file, or folder of frames, ``img_path``.

    Adds 'frames' (clips, num_frames, 3, height, width), 'frame_indices', 'total_frames' and
    'ori_shape'. A video with fewer frames than a clip needs repeats some of them (see
    :func:`mmvim.datasets.video.uniform_indices` and :func:`~mmvim.datasets.video.dense_indices`).

    Args:
        num_frames (int): Frames of a clip. Defaults to 8.
        sampling (str): 'uniform' takes frames from the whole video, as TSN does; 'dense' takes
            consecutive ones that are ``interval`` apart. Defaults to 'uniform'.
        interval (int): Distance between frames with 'dense'. Defaults to 1.
        num_clips (int, optional): None draws one clip at random; a number selects that many fixed
            ones. Defaults to None.
        by_time (bool): For frames of unequal duration: False counts frames, as the official
            VideoMamba does; True takes those visible at regular times. Defaults to
            False.
        min_frames (int): A video with fewer frames is an error. Defaults to 1.
        num_threads (int): Decoding threads. Defaults to 1.
        on_error (str): Reaction to an unusable file: 'raise' ends the run with an error that names
            the file; 'skip' warns, and a training set takes another sample instead (in
            evaluation it is still an error: a result must not hide missing samples).
            Defaults to 'raise'.
        frame_template (str, optional): Names of the frames where ``img_path`` is a folder, such as
            ``'img_{:05}.jpg'``. Defaults to None: all pictures in it, by their numbers.

    Raises:
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        num_frames: int = 8,
        sampling: str = 'uniform',
        interval: int = 1,
        num_clips: int | None = None,
        by_time: bool = False,
        min_frames: int = 1,
        num_threads: int = 1,
        on_error: str = 'raise',
        frame_template: str | None = None,
    ) -> None:
        check_choice('sampling', sampling, ('uniform', 'dense'))
        check_choice('on_error', on_error, ('raise', 'skip'))
        if sampling == 'uniform' and interval != 1:
            raise ValueError(f"interval={interval!r} has no effect with sampling='uniform'")
        check_positive(min_frames=min_frames)
        check_flags(by_time=by_time)
        if not isinstance(num_threads, int) or num_threads < 0:
            raise ValueError(f'num_threads={num_threads!r} must be an integer, 0 for automatic')
        self.num_frames = num_frames
        self.sampling = sampling
        self.interval = interval
        self.num_clips = num_clips
        self.by_time = by_time
        self.min_frames = min_frames
        self.num_threads = num_threads
        self.on_error = on_error
        self.frame_template = frame_template
        if frame_template is not None:
            check_template(frame_template)
        self._indices(1)  # checks the numbers

    def _indices(self, total: int):
        if self.sampling == 'uniform':
            return uniform_indices(total, self.num_frames, self.num_clips)
        return dense_indices(total, self.num_frames, self.interval, self.num_clips)

    def __call__(self, results: dict) -> dict | None:
        """Add the frames to a sample."""
        try:
            return self._load(results)
        except VideoSampleError as error:
            if self.on_error == 'raise':
                raise
            print_log(f'skipped: {error}', logger='current', level=logging.WARNING)
            return None

    def _load(self, results: dict) -> dict:
        path = results['img_path']
        with open_video(path, self.num_threads, self.frame_template) as video:
            total = len(video)
            if total < self.min_frames:
                raise VideoSampleError(
                    f'the video {results["img_path"]!r} has {total} frames; '
                    f'min_frames={self.min_frames} are needed'
                )
            indices = self._indices(total)
            if self.by_time:
                indices = at_regular_times(indices, video.timestamps)
            frames = video.frames(indices.ravel())
        results['frames'] = frames.unflatten(0, indices.shape)
        results['frame_indices'] = indices
        results['total_frames'] = total
        results['ori_shape'] = results['img_shape'] = tuple(frames.shape[-2:])
        return results

    def __repr__(self) -> str:
        return (
            f'LoadVideo(num_frames={self.num_frames}, sampling={self.sampling!r}, '
            f'interval={self.interval}, num_clips={self.num_clips}, by_time={self.by_time})'
        )


@TRANSFORMS.register_module()
class VideoTransform:
    """A transform of ``torchvision.transforms.v2``, applied equally to all frames of a sample.

    Args:
        name (str): A class of :mod:`torchvision.transforms.v2`, such as 'RandomResizedCrop'.
        **options: Its arguments; ``interpolation`` may be a name such as 'bicubic'.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: If there is no such transform.
    """

    def __init__(self, name: str, **options: Any) -> None:
        from torchvision import tv_tensors
        from torchvision.transforms import InterpolationMode, v2

        kind = getattr(v2, name, None)
        if not (isinstance(kind, type) and issubclass(kind, v2.Transform)):
            raise ValueError(f'name={name!r} is no transform of torchvision.transforms.v2')
        allowed = [parameter.name for parameter in parameters(kind)]
        unknown = [option for option in options if option not in allowed]
        if unknown:
            raise TypeError(
                f'name={name!r} has no option {unknown[0]!r}; allowed: {", ".join(allowed)}'
            )
        for parameter in parameters(kind):
            if parameter.default is parameter.empty and parameter.name not in options:
                raise TypeError(f'name={name!r} needs the option {parameter.name!r}')
        if isinstance(options.get('interpolation'), str):
            options['interpolation'] = InterpolationMode(options['interpolation'])
        self._options = options
        self._video = tv_tensors.Video
        with _naming_options(kind, options):
            self.transform = kind(**options)

    def __call__(self, results: dict) -> dict:
        """Transform the frames of a sample."""
        frames = results['frames']
        with _naming_options(type(self.transform), self._options):
            out = self.transform(self._video(frames.flatten(0, 1)))
        results['frames'] = out.as_subclass(Tensor).unflatten(0, frames.shape[:2])
        results['img_shape'] = tuple(out.shape[-2:])
        return results

    def __repr__(self) -> str:
        return f'VideoTransform({self.transform})'


@TRANSFORMS.register_module()
class RandomErasingVideo:
    """Noise in one random rectangle, the same in all frames of a view.

    Like timm's ``RandomErasing`` in 'pixel' mode: each erased value is drawn from the normal
    distribution with the mean and standard deviation of its channel.

    Args:
        prob (float): Probability. Defaults to 0.25.
        area (tuple): Range of the rectangle's share of the area. Defaults to (0.02, 1/3).
        ratio (float): Aspect ratios are drawn log-uniformly from [ratio, 1 / ratio]. Defaults to
            0.3.
        mean (tuple): Mean of each channel, in 0 .. 255. Defaults to ImageNet's.
        std (tuple): Standard deviation of each channel. Defaults to ImageNet's.
    """

    def __init__(
        self,
        prob: float = 0.25,
        area: tuple[float, float] = (0.02, 1 / 3),
        ratio: float = 0.3,
        mean: tuple[float, ...] = (123.675, 116.28, 103.53),
        std: tuple[float, ...] = (58.395, 57.12, 57.375),
    ) -> None:
        check_number('prob', prob, 0)
        check_number('ratio', ratio, 0)
        for name, values in (('area', area), ('mean', mean), ('std', std)):
            check_numbers(name, values)
        if prob > 1:
            raise ValueError(f'prob={prob!r} must be in [0, 1]')
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f'area={area!r} must be an ascending pair in (0, 1]')
        if not 0 < ratio <= 1:
            raise ValueError(f'ratio={ratio!r} must be in (0, 1]')
        if len(mean) != len(std) or min(std) < 0:
            raise ValueError(f'mean={mean!r} and std={std!r} must be equally long, std >= 0')
        self.prob = prob
        self.area = area
        self.log_ratio = torch.tensor(1 / ratio).log().item()
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, results: dict) -> dict:
        """Erase a part of a sample's frames."""
        frames = results['frames'].clone()
        for view in frames:
            if torch.rand(()) < self.prob:
                self._erase(view)
        results['frames'] = frames
        return results

    def _erase(self, view: Tensor) -> None:
        height, width = view.shape[-2:]
        for _ in range(10):
            area = torch.empty(()).uniform_(*self.area).item() * height * width
            aspect = torch.empty(()).uniform_(-self.log_ratio, self.log_ratio).exp().item()
            rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < rows < height and 0 < columns < width:
                top = torch.randint(height - rows + 1, ()).item()
                left = torch.randint(width - columns + 1, ()).item()
                box = view[..., top : top + rows, left : left + columns]
                noise = torch.randn(box.shape) * self.std + self.mean
                box.copy_(noise.round_().clamp_(0, 255))
                return

    def __repr__(self) -> str:
        return f'RandomErasingVideo(prob={self.prob}, area={self.area})'


@TRANSFORMS.register_module()
class ThreeCrop:
    """Three square crops along the longer side: at its start, middle and end.

    Each view becomes three, in this order. For a square video all three are equal.

    Args:
        size (int): Side of the squares; the shorter side must be at least as long.
    """

    def __init__(self, size: int) -> None:
        check_positive(size=size)
        self.size = size

    def __call__(self, results: dict) -> dict:
        """Cut a sample's frames."""
        frames, size = results['frames'], self.size
        height, width = frames.shape[-2:]
        if min(height, width) < size:
            raise ValueError(
                f'frames of {height}x{width} are smaller than a crop of {size}x{size}: resize the '
                'shorter side first'
            )
        room_y, room_x = height - size, width - size
        if room_x >= room_y:
            places = [(room_y // 2, x) for x in (0, room_x // 2, room_x)]
        else:
            places = [(y, room_x // 2) for y in (0, room_y // 2, room_y)]
        crops = [frames[..., y : y + size, x : x + size] for y, x in places]
        results['frames'] = torch.stack(crops, dim=1).flatten(0, 1)
        results['img_shape'] = (size, size)
        return results

    def __repr__(self) -> str:
        return f'ThreeCrop(size={self.size})'


@TRANSFORMS.register_module()
class RepeatAugment:
    """Repeated augmentation of the decoded frames, each time as a separate view.

    In training, :class:`mmvim.VideoDataPreprocessor` turns each view into a sample, so a batch of B
    videos becomes one of ``times`` x B clips (Hoffer et al., https://arxiv.org/abs/1901.09335).

    Args:
        times (int): Number of repetitions. Defaults to 2.
        transforms (list[dict]): Steps to run each time.
    """

    def __init__(self, transforms: list[dict], times: int = 2) -> None:
        check_positive(times=times)
        self.times = times
        self.transforms = Compose(transforms)

    def __call__(self, results: dict) -> dict:
        """Augment a sample's frames."""
        outputs = [self.transforms(dict(results)) for _ in range(self.times)]
        results = outputs[-1]
        results['frames'] = torch.cat([output['frames'] for output in outputs])
        return results

    def __repr__(self) -> str:
        return f'RepeatAugment(times={self.times}, transforms={self.transforms})'


@TRANSFORMS.register_module()
class PackVideo:
    """Packing into the format of mmpretrain's models and metrics: 'inputs' and 'data_samples'.

    'inputs' is uint8, (3, frames, height, width) for one view and (views, 3, frames, height,
    width) for several. 'data_samples' is mmpretrain's ``DataSample`` with the label.

    Args:
        meta_keys (tuple[str]): Other entries that the data sample keeps.
    """

    META_KEYS = ('sample_idx', 'img_path', 'ori_shape', 'img_shape', 'total_frames')

    def __init__(self, meta_keys: tuple[str, ...] = META_KEYS) -> None:
        if not isinstance(meta_keys, list | tuple) or not all(
            isinstance(key, str) for key in meta_keys
        ):
            raise ValueError(f'meta_keys={meta_keys!r} must be a sequence of names')
        self.meta_keys = tuple(meta_keys)

    def __call__(self, results: dict) -> dict:
        """Pack a sample."""
        from mmpretrain.structures import DataSample

        inputs = results['frames'].transpose(1, 2).contiguous()
        sample = DataSample()
        if 'gt_label' in results:
            sample.set_gt_label(results['gt_label'])
        sample.set_metainfo({key: results[key] for key in self.meta_keys if key in results})
        return {'inputs': inputs[0] if len(inputs) == 1 else inputs, 'data_samples': sample}

    def __repr__(self) -> str:
        return f'PackVideo(meta_keys={self.meta_keys})'
