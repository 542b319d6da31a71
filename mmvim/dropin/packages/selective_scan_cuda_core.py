"""A compiled module of VMamba, on :mod:`mmvim.ops`: a scan without gate."""

from mmvim.dropin.vmamba import bwd, fwd

__all__ = ['bwd', 'fwd']
