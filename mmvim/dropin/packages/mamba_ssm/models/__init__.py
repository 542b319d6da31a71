"""Models of mamba_ssm."""
