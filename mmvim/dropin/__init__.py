"""Import names of mamba_ssm and causal_conv1d, backed by :mod:`mmvim.ops`, where they are missing.

>>> import mmvim.dropin
>>> mmvim.dropin.install()
>>> from mamba_ssm import Mamba

``python -m mmvim.dropin script.py`` runs a script so, and ``MMVIM_DROPIN=1`` in the environment
serves processes that others start. Without one of the three nothing changes.
"""

from .finder import NAMES, PACKAGES, Status, install, status, uninstall

__all__ = ['NAMES', 'PACKAGES', 'Status', 'install', 'status', 'uninstall']
