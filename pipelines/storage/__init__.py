"""Datasets on disk: where images come from, and the one file they are converted to."""
