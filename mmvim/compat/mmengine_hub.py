"""``mmengine.hub.get_model('mmvim::vim/…')``.

Why: mmengine's hub builds a model in the scope of the package that the config comes from. mmvim's
configs keep the scope of their task library, whose classifiers, detectors and segmentors cannot be
seen from the scope ``mmvim``. It also loads weights without the types that official files need.

How: configs of mmvim are built by :func:`mmvim.get_model`, those of other packages as before.

Obsolete with: a hub that respects a config's ``default_scope``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from mmvim import _names

from ._import_hook import replaces, when_imported

_PREFIX = 'mmvim::'


def install() -> None:
    """Act when mmengine's hub is imported."""
    when_imported('mmengine.hub.hub', _patch)


def _patch(hub: ModuleType) -> None:
    @replaces(hub, 'get_model')
    def get_model(
        original: Callable, cfg_path: str, pretrained: bool = False, **kwargs: Any
    ) -> Any:
        if not cfg_path.startswith(_PREFIX):
            return original(cfg_path, pretrained, **kwargs)
        cfg = hub.get_config(cfg_path, pretrained)
        if pretrained and cfg.get('model_path') is None:
            raise ValueError(f'no weights were published for {cfg_path!r}')
        model = _names.load('get_model')(cfg, cfg.model_path if pretrained else False, **kwargs)
        # As in the original: a runner must not initialise the weights again.
        model._is_init = bool(pretrained)
        return model
