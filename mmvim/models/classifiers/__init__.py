"""Classifiers that mmpretrain does not have.

They derive from mmpretrain's, which is imported when the first of them is built: users of a
detector need not have it.
"""

from typing import Any

from mmvim.registry import MODELS

__all__ = ['MesaClassifier']


@MODELS.register_module()
def MesaClassifier(*args: Any, **kwargs: Any) -> Any:
    """Build a :class:`mmvim.models.classifiers.mesa.MesaClassifier`, which then has this name."""
    from .mesa import MesaClassifier as Classifier

    return Classifier(*args, **kwargs)
