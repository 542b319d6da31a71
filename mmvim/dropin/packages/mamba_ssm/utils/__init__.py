"""Utilities of mamba_ssm."""
