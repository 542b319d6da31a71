"""Classification of whole videos."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.registry import DefaultScope

from mmvim.datasets.video import open_video

from ..model_zoo import load_config
from ..videos import find_videos
from .common import TOP, Inference, Result, make_model, name_classes, ranked
from .pipeline import VIDEO_LOADER, reads_videos, transforms_of
from .text import enlarge, write_lines


class VideoInferencer(Inference):
    """Classifier of videos, by the clips of the config's test pipeline.

    None of the three libraries has an inferencer for videos; this one works like mmvim's others.

    Args:
        model: A name from the model zoo, the path of a config, or a config.
        weights: Path or URL of a checkpoint; True takes the authors' weights of the model. Defaults
            to None: random weights, with a warning.
        device: The device. Defaults to None: the first accelerator, else the CPU.
        classes: Names of the classes. Defaults to None: those of the checkpoint or the config.

    Raises:
        ValueError: The config's test pipeline does not read videos.
        ImportError: PyAV is not installed.

    Example:
        >>> inferencer = VideoInferencer('configs/quickstart/videomamba_digits_video.py', 'x.pth')
        >>> next(inferencer.predict('digit.mp4')).prediction['classes'][0]
        {'class': '3 left', 'label': 14, 'score': 0.93}
    """

    def __init__(
        self, model: Any, weights: Any = None, device: Any = None, classes: Any = None
    ) -> None:
        cfg = load_config(model)
        if not reads_videos(cfg):
            raise ValueError(f"the config's test pipeline does not begin with mmvim.{VIDEO_LOADER}")
        self.device = torch.device(device or get_device())
        self.model = make_model(model, cfg, weights).to(self.device)
        if classes is not None:
            name_classes(self.model, classes)
        self.frame_template = transforms_of(cfg)[0].get('frame_template')
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            self.pipeline = Compose(transforms_of(cfg))

    def predict(
        self, inputs: str | Path | Sequence[str | Path], batch_size: int = 1
    ) -> Iterator[Result]:
        """Classify videos, a batch at a time.

        Args:
            inputs: See :func:`mmvim.apis.videos.find_videos`.
            batch_size: Videos at a time; clips of different sizes go into different batches.
                Defaults to 1.

        Raises:
            mmvim.datasets.video.VideoSampleError: There are no videos, or one cannot be read.
            ValueError: ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}')
        read = ((name, self.pipeline({'img_path': name})) for name in find_videos(inputs))
        for batch in self._batches(read, batch_size):
            yield from self._classify(batch)

    def _classify(self, batch: list[tuple[str, dict]]) -> Iterator[Result]:
        parts = {key: [data[key] for _, data in batch] for key in ('inputs', 'data_samples')}
        with torch.no_grad():
            samples = self.model.test_step(parts)
        for (name, _), sample in zip(batch, samples, strict=True):
            with open_video(name, frame_template=self.frame_template) as video:
                middle = video.frames([len(video) // 2])[0].permute(1, 2, 0).numpy()
            image = np.ascontiguousarray(middle[..., ::-1])
            yield Result(name, image, sample, {'video': name, **self._plain(sample)})

    def _plain(self, sample: Any) -> dict[str, Any]:
        return {'classes': ranked(sample.pred_score, TOP, self._class_name)}

    def _draw(self, result: Result, frame: np.ndarray | None = None) -> np.ndarray:
        """Write the best classes over an RGB frame, by default the middle one of the video."""
        picture = result.image[..., ::-1] if frame is None else frame
        found = result.prediction['classes'][:3]
        return write_lines(enlarge(picture), [f'{x["score"]:4.0%} {x["class"]}' for x in found])
