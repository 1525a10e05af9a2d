"""Triton kernels, for CUDA."""
