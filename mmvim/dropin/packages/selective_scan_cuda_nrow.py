"""A compiled module of VMamba, on :mod:`mmvim.ops`: a scan of several rows per block."""

from mmvim.dropin.vmamba import bwd, fwd

__all__ = ['bwd', 'fwd']
