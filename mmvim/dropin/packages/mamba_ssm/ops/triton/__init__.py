"""Functions that mamba_ssm writes in Triton, here on :mod:`mmvim.ops`, for every device."""
