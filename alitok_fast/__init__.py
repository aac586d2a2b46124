"""AliTok image tokenizer and generator with native CPU and CUDA kernels."""

__version__ = "0.1.0"
