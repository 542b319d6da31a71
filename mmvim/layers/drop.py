"""Stochastic depth."""

from torch import Tensor, nn

from mmvim._checks import check_number


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al., https://arxiv.org/abs/1603.09382).

    In training, a sample of the batch is zeroed with probability ``drop_prob`` and scaled by
    ``1 / (1 - drop_prob)`` otherwise. In evaluation it is the identity.

    Args:
        drop_prob (float): Probability, in [0, 1). Defaults to 0.

    Raises:
        ValueError: If ``drop_prob`` is not in [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_number('drop_prob', drop_prob, 0, 1)
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of ``x`` (batch, ...)."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f'drop_prob={self.drop_prob:.4g}'
