"""The type of what is told how far the writing is."""

from collections.abc import Callable

#: Called with (files written, files in all).
Progress = Callable[[int, int], None]
