"""Augmentation after the crop: uint8 crops and drawn parameters to the model input."""
