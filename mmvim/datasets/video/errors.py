"""The errors of video files."""

from mmvim.errors import SampleError


class VideoSampleError(SampleError):
    """A video file cannot be used; the message names the file and says why."""
