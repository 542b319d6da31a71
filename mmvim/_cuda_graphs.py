"""Recording of CUDA graphs."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not in this block, in which a graph is recorded.

    A graph that the collector destroys while another one is recorded breaks off the recording
    ("operation failed due to a previous error during capture").
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
