"""Layers of mamba_ssm."""
