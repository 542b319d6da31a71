"""Generation of text; vision models only import it, or keep states with ``InferenceParams``."""

from dataclasses import dataclass, field

from torch import Tensor

from mmvim.dropin.placeholders import attributes_of, missing

__all__ = ['GenerationMixin', 'InferenceParams']
__getattr__ = attributes_of(__name__)


@dataclass
class InferenceParams:
    """States of a model between calls, by layer.

    Attributes:
        max_seqlen: Longest sequence.
        max_batch_size: Largest batch.
        seqlen_offset: Steps so far; with 0 a layer starts, later it takes one step per call.
        batch_size_offset: First row of the batch.
        key_value_memory_dict: (conv_state, ssm_state) for each ``layer_idx``.
        lengths_per_sample: (b,), the lengths of sequences.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start again, with the same states in memory."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class GenerationMixin:
    """Base of models that generate text, which mmvim does not."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        """The model's own method."""
        raise NotImplementedError(f'{type(self).__name__} does not define it')

    def generate(self, *args: object, **kwargs: object) -> None:
        """Raise: generation of text needs mamba_ssm itself."""
        raise missing(__name__, 'GenerationMixin.generate')
