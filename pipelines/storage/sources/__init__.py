"""Sources of images: what people have, as classes, splits and readable images."""
