"""mamba_ssm, on :mod:`mmvim.ops`: the parts that vision models use."""

from mmvim.dropin.placeholders import attributes_of

from .modules.mamba_simple import Mamba
from .ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn, selective_scan_fn

__all__ = ['Mamba', 'bimamba_inner_fn', 'mamba_inner_fn', 'selective_scan_fn']
__version__ = '2.2.2'
# transformers searches this module, and would take a placeholder for a function.
__getattr__ = attributes_of(__name__, 'Mamba2', 'Mamba3', 'MambaLMHeadModel')
