"""What ``mmcv.utils.collect_env`` reports about the compiled ops."""

__all__ = ['get_compiler_version', 'get_compiling_cuda_version']


def get_compiler_version() -> str:
    """Stands where the compiler's name and version would."""
    return 'none: mmcv has no compiled ops, mmvim supplies some of them from torchvision'


def get_compiling_cuda_version() -> str:
    """What a build of mmcv without CUDA reports."""
    return 'not available'
