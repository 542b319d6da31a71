"""Functions of mamba_ssm."""
