"""The dali loader: NVIDIA DALI decodes each image once and crops all its views."""
