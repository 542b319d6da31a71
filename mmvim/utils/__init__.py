"""Set-up that mmengine expects of a package."""

from mmengine.registry import DefaultScope

__all__ = ['register_all_modules']


def register_all_modules(init_default_scope: bool = True) -> None:
    """Import everything that mmvim registers, as ``mmengine.hub`` wants it.

    Args:
        init_default_scope (bool): Whether to make 'mmvim' the default scope if none is set.
            mmvim's configs keep the scope of their task library, which can be seen from 'mmvim'
            only with its prefix, so a scope that is set is left alone. Defaults to True.
    """
    import mmvim.datasets
    import mmvim.engine
    import mmvim.models  # noqa: F401

    if init_default_scope and DefaultScope.get_current_instance() is None:
        DefaultScope.get_instance('mmvim', scope_name='mmvim')
