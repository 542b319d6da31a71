"""Type of the callback that reports progress in writing files."""

from collections.abc import Callable

#: Called with (files written, total files).
Progress = Callable[[int, int], None]
