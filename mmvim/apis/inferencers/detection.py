"""Detection and instance segmentation on images."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from mmdet.apis import DetInferencer

from .common import EngineInference, Result


class DetectionInferencer(EngineInference, DetInferencer):
    """mmdet's inferencer for detectors of mmvim.

    Args:
        model: A name from the model zoo, the path of a config, or a config.
        weights: Path or URL of a checkpoint. Defaults to None: random weights, with a warning.
        device: The device. Defaults to None: the first accelerator, else the CPU.
        score_threshold: Boxes with lower scores are dropped. Defaults to 0.3.
    """

    def __init__(
        self, model: Any, weights: Any = None, device: Any = None, score_threshold: float = 0.3
    ) -> None:
        self.score_threshold = score_threshold
        self._start(model, weights, device)

    def _init_model(self, cfg: Any, weights: Any, device: Any = 'cpu') -> Any:
        model = super()._init_model(cfg, weights, device)
        model.dataset_meta.setdefault('palette', 'random')
        return model

    def _fits(self, data: dict, other: dict) -> bool:
        return True  # the data preprocessor pads

    def _get_chunk_data(self, inputs: Iterable[Any], chunk_size: int) -> Iterator[list]:
        return DetInferencer._get_chunk_data(self, inputs, chunk_size)

    def _plain(self, sample: Any) -> dict[str, Any]:
        kept = sample.pred_instances[sample.pred_instances.scores >= self.score_threshold]
        described = self.pred2dict(type(sample)(pred_instances=kept))
        columns = (described['labels'], described['scores'], described['bboxes'])
        masks = described.get('masks')
        return {
            'objects': [
                {
                    'class': self._class_name(label),
                    'label': label,
                    'score': round(score, 6),
                    'box': [round(side, 2) for side in box],
                    **({'mask': masks[i]} if masks is not None else {}),
                }
                for i, (label, score, box) in enumerate(zip(*columns, strict=True))
            ]
        }

    def _draw(self, result: Result, **options: Any) -> np.ndarray:
        """Draw boxes and masks over the image, in RGB."""
        self.visualizer.add_datasample(
            'image',
            result.image[..., ::-1],
            result.sample.cpu(),
            draw_gt=False,
            pred_score_thr=self.score_threshold,
            **options,
        )
        return self.visualizer.get_image()
