"""Classification of images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmpretrain.apis import ImageClassificationInferencer

from ..model_zoo import load_config
from .common import TOP, LibraryInference, Result, make_model, name_classes, ranked


class ClassificationInferencer(LibraryInference, ImageClassificationInferencer):
    """mmpretrain's inferencer for classifiers of mmvim.

    Args:
        model: A name from the model zoo, the path of a config, or a config.
        weights: Path or URL of a checkpoint; True takes the authors' weights of the model. Defaults
            to None: random weights, with a warning.
        device: The device. Defaults to None: the first accelerator, else the CPU.
        classes: Names of the classes. Defaults to None: those of the checkpoint or the config.

    Example:
        >>> inferencer = ClassificationInferencer('vim-tiny_3rdparty_in1k', True)
        >>> next(inferencer.predict('cat.jpg')).prediction['classes'][0]
        {'class': 'tabby, tabby cat', 'label': 281, 'score': 0.61}
    """

    def __init__(
        self, model: Any, weights: Any = None, device: Any = None, classes: Any = None
    ) -> None:
        built = make_model(model, load_config(model), weights)
        if classes is not None:
            name_classes(built, classes)
        # mmpretrain uses None for class names that are mere numbers.
        super().__init__(
            built, device=device or get_device(), classes=built.dataset_meta.get('classes')
        )

    def preprocess(self, inputs: list, batch_size: int = 1) -> Iterator:
        """Read and pack images: the library's own way would read them as 8-bit colour."""
        chunks = self._get_chunk_data(map(self.pipeline, inputs), batch_size)
        yield from map(pseudo_collate, chunks)

    def _plain(self, sample: Any) -> dict[str, Any]:
        return {'classes': ranked(sample.pred_score, TOP, self._class_name)}

    def _draw(self, result: Result, **options: Any) -> np.ndarray:
        """Draw the class and its score over the image, in RGB; small images are enlarged."""
        from mmpretrain.visualization import UniversalVisualizer

        if self.visualizer is None:
            self.visualizer = UniversalVisualizer()
        if min(result.image.shape[:2]) < 224:
            options.setdefault('resize', 224)
        self.visualizer.visualize_cls(
            result.image[..., ::-1],
            result.sample,
            classes=self.class_names,
            draw_gt=False,
            draw_pred=True,
            **options,
        )
        return self.visualizer.get_image()
