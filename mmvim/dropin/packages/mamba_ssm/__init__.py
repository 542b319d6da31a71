"""mamba_ssm, on :mod:`mmvim.ops`: the parts that vision models use."""

from mmvim.dropin.placeholders import attributes_of

from .modules.mamba_simple import Mamba
from .ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn, selective_scan_fn

__all__ = ['Mamba', 'bimamba_inner_fn', 'mamba_inner_fn', 'selective_scan_fn']
__version__ = '2.2.2'
__getattr__ = attributes_of(__name__)
