"""Augmentation in batched torch operations: the reference for the Triton kernels."""
