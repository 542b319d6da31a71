"""Random resized crops as Pillow makes them, in a fraction of its time."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmvim._checks import check_choice, check_positive
from mmvim.registry import TRANSFORMS


@TRANSFORMS.register_module()
class RandomResizedCrop:
    """Crop of random area and aspect ratio, resized with an antialiasing filter (Inception).

    The crop is that of mmpretrain's ``RandomResizedCrop``, resized by PyTorch with the filters of
    ``backend='pillow'``: 8-bit values are equal or differ by one, in rare cases by two. Also for
    images of any number of channels and other types than uint8, which Pillow refuses.

    Changes 'img', an array (height, width) or (height, width, channels), and 'img_shape'.

    Args:
        scale (int | tuple[int, int]): Size of the result in pixels, or (height, width).
        crop_ratio_range (tuple[float, float]): Area of the crop as a fraction of the image's.
            Defaults to (0.08, 1.0).
        aspect_ratio_range (tuple[float, float]): Width over height of the crop.
            Defaults to (3 / 4, 4 / 3).
        interpolation (str): 'bilinear' or 'bicubic'. Defaults to 'bilinear'.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: If an argument is invalid.
    """

    def __init__(
        self,
        scale: int | tuple[int, int],
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = 'bilinear',
    ) -> None:
        from torchvision.transforms import RandomResizedCrop as Crops

        self._draw = Crops.get_params
        size = (scale, scale) if isinstance(scale, int) else tuple(scale)
        if len(size) != 2:
            raise ValueError(f'scale={scale!r} must be a size or (height, width)')
        for side in size:
            check_positive(scale=side)
        for name, (low, high) in (
            ('crop_ratio_range', crop_ratio_range),
            ('aspect_ratio_range', aspect_ratio_range),
        ):
            if not 0 < low <= high:
                raise ValueError(f'{name}={(low, high)!r} must be two positive numbers in order')
        check_choice('interpolation', interpolation, ('bilinear', 'bicubic'))
        self.size = size
        self.crop_ratio_range = list(crop_ratio_range)
        self.aspect_ratio_range = list(aspect_ratio_range)
        self.interpolation = interpolation

    def __call__(self, results: dict) -> dict:
        """Crop and resize the image of a sample."""
        image = results['img']
        pixels = torch.from_numpy(np.atleast_3d(image))
        top, left, height, width = self._draw(
            pixels.permute(2, 0, 1), self.crop_ratio_range, self.aspect_ratio_range
        )
        crop = self._resize(pixels[top : top + height, left : left + width])
        results['img'] = crop.numpy().reshape(*self.size, *image.shape[2:])
        results['img_shape'] = results['img'].shape
        return results

    def _resize(self, pixels: Tensor) -> Tensor:
        # Contiguous rows, and uint8 where it is, for PyTorch's vectorized kernel.
        planes = pixels.contiguous().permute(2, 0, 1)[None]
        eight_bits = planes.dtype == torch.uint8
        resized = interpolate(
            planes if eight_bits else planes.float(),
            size=self.size,
            mode=self.interpolation,
            antialias=True,
        )
        if not (eight_bits or planes.is_floating_point()):
            limits = torch.iinfo(planes.dtype)
            resized = resized.round().clamp(limits.min, limits.max)
        return resized[0].permute(1, 2, 0).contiguous().to(planes.dtype)

    def __repr__(self) -> str:
        return (
            f'RandomResizedCrop(scale={self.size}, crop_ratio_range={self.crop_ratio_range}, '
            f'aspect_ratio_range={self.aspect_ratio_range}, interpolation={self.interpolation!r})'
        )
