"""Models that are narrow enough for thousands of iterations on a CPU."""

import mmvim


def narrow_mambavision(**kwargs) -> mmvim.MambaVision:
    """Build a MambaVision with blocks of each kind."""
    arch = dict(
        mmvim.MambaVision.arch_zoo['tiny'],
        embed_dims=8,
        stem_dims=8,
        depths=(1, 1, 2, 2),
        num_heads=(2, 4),
    )
    return mmvim.MambaVision(arch=arch, **kwargs)
