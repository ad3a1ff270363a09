"""cctrain: train criss-cross transformers on whole cells."""

__version__ = "0.1.0"
