"""Plots of maps over images, of receptive fields and of states."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Dots per inch of the plots.
DPI = 100


def _pyplot():
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt


def _save(figure, out: str | Path) -> Path:
    figure.savefig(out, dpi=DPI)
    _pyplot().close(figure)
    return Path(out)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (..., rows, columns) bilinearly to an image's height and width."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    large = torch.nn.functional.interpolate(flat, size, mode='bilinear', align_corners=False)
    return large.reshape(*maps.shape[:-2], *size)


def draw_maps(
    picture: np.ndarray | Sequence[np.ndarray],
    rows: Sequence[tuple[str, Mapping[str, Tensor]]],
    out: str | Path,
    *,
    title: str = '',
    overlay: bool = True,
) -> Path:
    """Draw maps of tokens over an image, or over the frames of a clip.

    Each row of panels has its own colour scale, with its limits next to it.

    Args:
        picture: RGB uint8, (height, width, 3) or (frames, height, width, 3), or an image of the
            same size for each row.
        rows: Title of each row, and its maps by name: (rows, columns) each, or (steps, rows,
            columns) for clips, whose maps get one row each, with one panel per step.
        out: File to write.
        title: Title of the whole picture. Defaults to ''.
        overlay: Whether the image shines through. Defaults to True.
    """
    plt = _pyplot()
    is_clip = isinstance(picture, np.ndarray) and picture.ndim == 4
    pictures = list(picture) if isinstance(picture, list | tuple) else [picture] * len(rows)
    if is_clip:
        panels = [
            (f'{title_}, {name}', {str(i): m for i, m in enumerate(maps)})
            for title_, by_name in rows
            for name, maps in by_name.items()
        ]
    else:
        panels = list(rows)
    columns = 1 + max(len(maps) for _, maps in panels) if not is_clip else len(panels[0][1])
    height, width = pictures[0].shape[-3:-1]
    side = 2.1
    figure, axes = plt.subplots(
        len(panels),
        columns,
        figsize=(side * columns * width / height + 0.8, (side + 0.25) * len(panels) + 0.3),
        layout='constrained',
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (line, (label, maps)) in enumerate(zip(axes, panels, strict=True)):
        low = min(float(m.min()) for m in maps.values())
        high = max(float(m.max()) for m in maps.values())
        # The forward scan of a leading class token reads nothing: a map of zeros.
        high = high if high > low else low + 1
        shown = None
        line[0].set_title(label, fontsize=9, loc='left')
        if not is_clip:
            line[0].imshow(pictures[number])
        for i, (name, values) in enumerate(maps.items()):
            axis = line[i if is_clip else i + 1]
            below = picture[i * len(picture) // len(maps)] if is_clip else pictures[number]
            if not is_clip:
                axis.set_title(name, fontsize=9)
            if overlay:
                axis.imshow(below.mean(-1), cmap='gray', vmin=0, vmax=255)
            large = enlarge(values.cpu(), (height, width)).numpy()
            shown = axis.imshow(
                large, cmap='inferno', vmin=low, vmax=high, alpha=0.75 if overlay else 1
            )
        bar = figure.colorbar(shown, ax=line.tolist(), fraction=0.04, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return _save(figure, out)


def draw_fields(fields: Mapping[str, Tensor], out: str | Path) -> Path:
    """Draw receptive fields side by side, on one logarithmic scale of four decades."""
    plt = _pyplot()
    from matplotlib.colors import LogNorm

    figure, axes = plt.subplots(
        1,
        len(fields),
        figsize=(3.2 * len(fields) + 0.8, 3.5),
        layout='constrained',
        squeeze=False,
    )
    shown = None
    for axis, (name, field) in zip(axes.flat, fields.items(), strict=True):
        values = field.clamp(min=1e-4).cpu().numpy()
        shown = axis.imshow(values, cmap='inferno', norm=LogNorm(1e-4, 1))
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes.ravel().tolist(), fraction=0.04, pad=0.02)
    return _save(figure, out)


def draw_norms(
    norms: Mapping[str, Mapping[str, Tensor]], out: str | Path, title: str | None = None
) -> Path:
    """Draw the sizes of states: over layers, and over layers and tokens.

    Args:
        norms: For each direction the norms of each layer, by name: (length,).
        out: File to write.
        title: Over the picture.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        1,
        1 + len(norms),
        figsize=(4.2 * (1 + len(norms)), 3.6),
        layout='constrained',
        squeeze=False,
    )
    if title:
        figure.suptitle(title)
    lines, *maps = axes.flat
    every = torch.cat([values for by_layer in norms.values() for values in by_layer.values()])
    high = float(every.max())
    for axis, (direction, by_layer) in zip(maps, norms.items(), strict=True):
        names = list(by_layer)
        lines.plot([float(v.mean()) for v in by_layer.values()], marker='o', ms=3, label=direction)
        longest = max(len(v) for v in by_layer.values())
        # Sequence lengths differ between the stages of a hierarchical model; all fill the panel.
        table = torch.stack(
            [
                torch.nn.functional.interpolate(v[None, None].float(), longest)[0, 0]
                for v in by_layer.values()
            ]
        )
        shown = axis.imshow(
            table.cpu().numpy(),
            aspect='auto',
            cmap='viridis',
            vmin=0,
            vmax=high,
            interpolation='nearest',
        )
        axis.set(title=f'{direction} scan', xlabel='token', ylabel='layer')
        axis.set_yticks(range(len(names)))
        axis.set_yticklabels(range(len(names)), fontsize=7)
        figure.colorbar(shown, ax=axis, fraction=0.05)
    lines.set(title='mean over tokens', xlabel='layer', ylabel='root mean square of the state')
    lines.set_ylim(bottom=0)
    lines.grid(alpha=0.3)
    lines.legend()
    return _save(figure, out)
