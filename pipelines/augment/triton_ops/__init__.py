"""Augmentation in Triton kernels, equal to `torch_ops` bit for bit."""
