"""Triton kernels, each beside its PyTorch reference; `ops` chooses. Imports nothing from minatp."""
