"""Measurements: what the compiler says of the kernels, and what a GPU does."""
