"""Selection of the frames of a clip."""

import numpy as np
import torch

from mmvim._checks import check_positive


def uniform_indices(total: int, num_frames: int, num_clips: int | None = None) -> np.ndarray:
    """Frames spread over the whole video: one from each of ``num_frames`` equal segments (TSN).

    Args:
        total (int): Frames of the video.
        num_frames (int): Frames of a clip.
        num_clips (int, optional): None draws a random frame from each segment and returns one
            clip, for training. Otherwise clip k of K takes each segment at (k + 1) / (K + 1) of its
            length. Defaults to None.

    Returns:
        np.ndarray: (clips, num_frames) int64, ascending. In a video shorter than ``num_frames``
        frames repeat.
    """
    check_positive(total=total, num_frames=num_frames)
    size = (total - 1) / num_frames
    starts = np.round(size * np.arange(num_frames + 1)).astype(np.int64)
    if num_clips is None:
        spread = starts[1:] - starts[:-1]
        draw = torch.rand(num_frames, dtype=torch.float64).numpy()
        return (starts[:-1] + np.floor(draw * (spread + 1)).astype(np.int64))[None]
    check_positive(num_clips=num_clips)
    offsets = (size / (num_clips + 1) * np.arange(1, num_clips + 1)).astype(np.int64)
    return np.minimum(starts[:-1] + offsets[:, None], total - 1)


def dense_indices(
    total: int, num_frames: int, interval: int = 1, num_clips: int | None = None
) -> np.ndarray:
    """Frames at a fixed interval, starting anywhere in the video.

    Args:
        total (int): Frames of the video.
        num_frames (int): Frames of a clip.
        interval (int): Distance between frames. Defaults to 1.
        num_clips (int, optional): None returns one clip from a random position, for training.
            Otherwise the starts are evenly spaced from the first possible position to the last (a
            single clip: in the middle). Defaults to None.

    Returns:
        np.ndarray: (clips, num_frames) int64. In a video shorter than a clip the last frame
        repeats.
    """
    check_positive(total=total, num_frames=num_frames, interval=interval)
    room = max(total - ((num_frames - 1) * interval + 1), 0)
    if num_clips is None:
        starts = torch.randint(room + 1, (1,)).numpy()
    else:
        check_positive(num_clips=num_clips)
        places = [room / 2] if num_clips == 1 else np.linspace(0, room, num_clips)
        starts = np.floor(places).astype(np.int64)
    return np.minimum(starts[:, None] + interval * np.arange(num_frames), total - 1)


def at_regular_times(indices: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Replace frames by those visible at regular times.

    Args:
        indices (np.ndarray): Numbers of frames, as if all had the same duration.
        timestamps (np.ndarray): (frames,) ascending times at which each actually appears.

    Returns:
        np.ndarray: Numbers of frames, shaped like ``indices``.
    """
    total = len(timestamps)
    if total == 1:
        return np.zeros_like(indices)
    times = timestamps[0] + (timestamps[-1] - timestamps[0]) * indices / (total - 1)
    slack = 1e-6 * (timestamps[-1] - timestamps[0])
    return np.clip(np.searchsorted(timestamps, times + slack, side='right') - 1, 0, total - 1)
