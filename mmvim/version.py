"""The version, which ``pyproject.toml`` states."""

__version__ = '0.1.0'
