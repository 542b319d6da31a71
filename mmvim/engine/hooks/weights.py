"""Choice of the weights of a checkpoint that a test uses."""

from typing import Any

from mmengine.hooks import Hook

from mmvim.checkpoints.files import EMA_CONTAINERS, EXCHANGED, find_weights
from mmvim.errors import CheckpointError
from mmvim.registry import HOOKS


@HOOKS.register_module()
class WeightsHook(Hook):
    """Make a run load the averaged or the trained weights of a checkpoint that has both.

    Averages are ``model_ema`` or ``state_dict_ema`` of official files. mmengine's ``EMAHook``
    swaps the two when it saves: there the averages are ``state_dict``, and ``ema_state_dict`` holds
    the trained weights.

    Args:
        ema (bool): Whether to take the averages.
    """

    # Before an EMAHook reads the loaded checkpoint.
    priority = 'VERY_HIGH'

    def __init__(self, ema: bool) -> None:
        self.ema = ema

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Put the chosen weights where mmengine reads them.

        Raises:
            mmvim.errors.CheckpointError: The checkpoint has no weights of this kind.
        """
        try:
            checkpoint['state_dict'] = find_weights(checkpoint, ema=self.ema)
        except CheckpointError as error:
            raise CheckpointError(f'checkpoint {runner._load_from!r} {error}') from None
        for name in (*EMA_CONTAINERS, EXCHANGED):
            checkpoint.pop(name, None)
