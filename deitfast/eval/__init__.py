"""Evaluation: predictions over a split, and the metrics computed from them."""
