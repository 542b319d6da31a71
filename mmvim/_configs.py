"""Reading of configs."""

from collections.abc import Mapping
from typing import Any


def type_name(component: Any) -> str:
    """Name of a component's class, without its scope.

    Args:
        component: The component's config, or its ``type``: a string such as ``'mmdet.CocoDataset'``
            or, as in mmengine's pure-Python configs, the class or function itself.

    Returns:
        For example ``'CocoDataset'``; an empty string if there is no type.
    """
    kind = component.get('type') if isinstance(component, Mapping) else component
    if kind is None:
        return ''
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
    return name.rpartition('.')[2]


def innermost_dataset(loader: Mapping | None) -> Mapping:
    """Config of the data set that a dataloader reads, below wrappers.

    Args:
        loader: A dataloader's config, such as ``cfg.test_dataloader``, or None.

    Returns:
        The wrapped data set; of several that are joined, the first. Empty if there is none.
    """
    dataset = (loader or {}).get('dataset') or {}
    while True:
        inner = dataset.get('dataset') or dataset.get('datasets')
        if isinstance(inner, (list, tuple)):
            inner = inner[0] if inner else None
        if not isinstance(inner, Mapping):
            return dataset
        dataset = inner
