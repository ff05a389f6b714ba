"""Compares deitfast with timm, Pillow and torchvision, line by line: `python -m tools.parity`."""
