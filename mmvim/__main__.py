"""``python -m mmvim``: versions and the state of the compiled kernels."""

import importlib
import platform
from pprint import pformat

import torch

import mmvim
from mmvim import ops


def _version(module: str) -> str:
    try:
        return importlib.import_module(module).__version__
    except ModuleNotFoundError as error:
        if error.name == module:
            return 'not installed'
        return f'cannot be imported: {error}'
    except Exception as error:  # a task library may refuse the versions of others
        return f'cannot be imported: {error}'


def main() -> None:
    """Print what belongs in a bug report."""
    print(f'mmvim {mmvim.__version__}, Python {platform.python_version()}, {platform.platform()}')
    for module in ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg'):
        print(f'{module}: {_version(module)}')
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f'CUDA devices: {devices or "none"}')
    info = ops.backend_info()
    print('ops:', info if isinstance(info, str) else pformat(info, sort_dicts=False))


if __name__ == '__main__':
    main()
