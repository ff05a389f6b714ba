"""Weights in and out: files of other programs, finished runs, checkpoints and exports."""
