"""Heed: attention and Transformers, derived by hand. Import from the file that teaches."""

__version__ = "0.1.0"
