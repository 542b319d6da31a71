"""State-space operators on tensors; they need only torch.

Every function has a PyTorch implementation that runs on any device and, where built, a compiled
one for CPU and CUDA. Channels come last: (batch, length, channels), or of maps (batch, height,
width, channels).
"""

from . import extension
from .add_rms_norm import add_rms_norm
from .backend import get_backend, intercept_ops, set_backend, use_backend
from .bidirectional_scan import ScanInputs, bidirectional_scan
from .causal_conv1d import bidirectional_conv1d, causal_conv1d
from .compat import (
    SelectiveScanCuda,
    causal_conv1d_fn,
    causal_conv1d_update,
    selective_scan_fn,
)
from .cross_scan import ROUTES, cross_scan
from .discretization import DISCRETIZATIONS, TWO_TAP
from .extension import backend_info, build
from .selective_scan import selective_scan

__all__ = [
    'DISCRETIZATIONS',
    'ROUTES',
    'TWO_TAP',
    'ScanInputs',
    'SelectiveScanCuda',
    'add_rms_norm',
    'backend_info',
    'bidirectional_conv1d',
    'bidirectional_scan',
    'build',
    'causal_conv1d',
    'causal_conv1d_fn',
    'causal_conv1d_update',
    'cross_scan',
    'get_backend',
    'intercept_ops',
    'selective_scan',
    'selective_scan_fn',
    'set_backend',
    'use_backend',
]

# The imports above define the ops, to which compiled kernels register.
extension.load()
