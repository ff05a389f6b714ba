"""From a batch on the device to a trained, evaluated DeiT. Built on `pipelines`."""

__version__ = "0.1.0"
