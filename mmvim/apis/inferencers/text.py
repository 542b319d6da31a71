"""Text on pictures, in any script for which a font is installed."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from mmengine.logging import print_log
from PIL import Image, ImageDraw, ImageFont

#: Smaller pictures are enlarged before text is drawn on them.
_LEGIBLE = 224


@functools.cache
def font_files(characters: frozenset[str]) -> tuple[str, ...]:
    """Font files for these characters: matplotlib's own, and another one if that lacks some.

    Characters that no installed font has are reported once, and drawn as boxes.
    """
    first = font_manager.findfont('DejaVu Sans')
    missing = {ord(c) for c in characters if not c.isspace()} - set(FT2Font(first).get_charmap())
    if not missing:
        return (first,)
    for entry in font_manager.fontManager.ttflist:
        if entry.name.startswith('Last Resort'):  # has boxes for all characters
            continue
        with contextlib.suppress(OSError, RuntimeError):
            if missing <= set(FT2Font(entry.fname).get_charmap()):
                return (first, entry.fname)
    print_log(
        f'no installed font has {"".join(map(chr, sorted(missing)[:8]))!r}: class names are drawn '
        'with boxes; install one that has (Debian, Ubuntu: fonts-noto-cjk)',
        logger='current',
        level=logging.WARNING,
    )
    return (first,)


@contextlib.contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Let matplotlib, which the task libraries use, draw with fonts for these texts."""
    files = font_files(frozenset(''.join(map(str, texts))))
    names = [FT2Font(file).family_name for file in files]
    with matplotlib.rc_context({'font.sans-serif': names}):
        yield


def write_lines(
    picture: np.ndarray,
    lines: Sequence[str],
    colours: Sequence[Sequence[int]] | None = None,
    below: bool = False,
) -> np.ndarray:
    """Write lines over a picture.

    Args:
        picture: RGB uint8 (height, width, 3).
        lines: From the upper left corner down.
        colours: RGB of each line. Defaults to None, white.
        below: Whether the lines end in the lower left corner instead.

    Returns:
        A copy of the picture with the text.
    """
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    height = max(min(picture.shape[:2]) / 480, 0.35) * 26
    # The last file has the characters that the first one lacks.
    font = ImageFont.truetype(font_files(frozenset(''.join(lines)))[-1], round(0.8 * height))
    top = picture.shape[0] - height * (len(lines) + 0.4) if below else 0.2 * height
    for i, line in enumerate(lines):
        colour = tuple(colours[i]) if colours is not None else (255, 255, 255)
        outline = (0, 0, 0) if sum(colour) > 200 else (255, 255, 255)
        place = (round(0.3 * height), round(top + i * height))
        width = max(1, round(height / 14))
        pen.text(place, line, colour, font, stroke_width=width, stroke_fill=outline)
    return np.asarray(image)


def enlarge(picture: np.ndarray) -> np.ndarray:
    """Repeat the pixels of a small picture (height, width, 3) until text on it can be read."""
    factor = max(1, math.ceil(_LEGIBLE / min(picture.shape[:2])))
    return picture.repeat(factor, 0).repeat(factor, 1)
