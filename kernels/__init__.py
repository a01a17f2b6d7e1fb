"""Triton kernels and their PyTorch references; `ops` chooses between them. Imports nothing from minatp."""
