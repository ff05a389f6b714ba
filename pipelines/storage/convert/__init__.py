"""Conversion: from a source of images to a data set's folder."""
