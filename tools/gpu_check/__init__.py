"""Measures deitfast on this machine's GPU, section by section: `python -m tools.gpu_check`."""
