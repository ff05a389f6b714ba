"""Distillation: teachers, their targets, and the cache that keeps them."""
