"""The build information that ``mmcv.utils.collect_env`` reports."""

__all__ = ['get_compiler_version', 'get_compiling_cuda_version']


def get_compiler_version() -> str:
    """A note in place of the compiler's name and version."""
    return 'none: mmcv has no compiled ops, mmvim supplies some of them from torchvision'


def get_compiling_cuda_version() -> str:
    """The value that a build of mmcv without CUDA reports."""
    return 'not available'
