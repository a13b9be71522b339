"""Triton kernels of mimkit; each one is a file of its own."""
