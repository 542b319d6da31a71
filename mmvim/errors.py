"""Errors that the user can fix."""

import os
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the config, the data, a checkpoint or the command line that the user can fix.

    Args:
        message: One line that names the thing, its value and what is allowed.
    """


class SampleError(UserError):
    """A sample (image or annotation) that cannot be loaded."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the model."""


def unreadable(path: str, error: Exception) -> str:
    """Say in one line why a file cannot be read."""
    if os.path.isdir(path):
        return 'it is a directory'
    if os.path.isfile(path) and not os.path.getsize(path):
        return 'the file is empty'
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]


def unfit_for_pillow(error: Exception) -> str | None:
    """Say that Pillow takes no images of so many channels or bits, or None of another error."""
    said = ('Cannot handle this data type', 'Pillow backend only support uint8')
    if not isinstance(error, (TypeError, AssertionError)) or not str(error).startswith(said):
        return None
    return (
        "Pillow resizes 8-bit images of 1, 3 or 4 channels only: backend='cv2' in the step that "
        f'resizes takes others ({error})'
    )


def from_where(path: str) -> str:
    """Say where a relative path starts, for messages."""
    return '' if os.path.isabs(os.path.expanduser(path)) else f' (seen from {os.getcwd()!r})'


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of ``choices``, or an empty string."""
    import difflib  # milliseconds of `import mmvim`, for errors alone

    close = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f' (did you mean {close[0]!r}?)' if close else ''
