"""Semantic segmentation of images."""

from typing import Any

import numpy as np
from mmseg.apis import MMSegInferencer

from .common import EngineInference, Result
from .text import write_lines


class SegmentationInferencer(EngineInference, MMSegInferencer):
    """mmseg's inferencer for segmentors of mmvim.

    Args:
        model: A name from the model zoo, the path of a config, or a config.
        weights: Path or URL of a checkpoint. Defaults to None: random weights, with a warning.
        device: The device. Defaults to None: the first accelerator, else the CPU.
        opacity: Opacity of the colours over the image. Defaults to 0.6.
    """

    def __init__(
        self, model: Any, weights: Any = None, device: Any = None, opacity: float = 0.6
    ) -> None:
        self.opacity = opacity
        self._start(model, weights, device)
        meta = self.model.dataset_meta
        classes, palette = meta.get('classes'), meta.get('palette')
        if classes and (not palette or len(palette) != len(classes)):
            # mmseg has colours only for its own data sets.
            colours = np.random.default_rng(0).integers(0, 256, (len(classes), 3))
            meta['palette'] = colours.tolist()
        self.visualizer.set_dataset_meta(**meta)
        self.visualizer.alpha = opacity

    @staticmethod
    def label_map(result: Result) -> np.ndarray:
        """The class of each pixel (height, width), uint8."""
        return result.sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)

    def _plain(self, sample: Any) -> dict[str, Any]:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        values, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts)
        return {
            'areas': [
                {
                    'class': self._class_name(int(values[i])),
                    'label': int(values[i]),
                    'share': round(float(counts[i] / labels.size), 6),
                }
                for i in order
            ]
        }

    def _draw(self, result: Result, **options: Any) -> np.ndarray:
        """Draw the classes' colours and names over the image, in RGB."""
        # mmseg writes names with OpenCV, which has no letters but ASCII's.
        readable = all(str(name).isascii() for name in self.class_names or ())
        options.setdefault('with_labels', readable)
        self.visualizer.add_datasample(
            'image',
            np.ascontiguousarray(result.image[..., ::-1]),
            result.sample.cpu(),
            draw_gt=False,
            **options,
        )
        picture = self.visualizer.get_image()
        if readable:
            return picture
        labels = [area['label'] for area in result.prediction['areas']]
        palette = self.model.dataset_meta['palette']
        names = [self._class_name(label) for label in labels]
        return write_lines(picture, names, [palette[label] for label in labels])
