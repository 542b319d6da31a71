"""A compiled module of VMamba, on :mod:`mmvim.ops`: a scan with a float32 output."""

from mmvim.dropin.vmamba import bwd, fwd

__all__ = ['bwd', 'fwd']
