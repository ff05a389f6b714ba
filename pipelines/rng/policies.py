"""The operations on an image's pixels by name, and AutoAugment's policy: data that draws and augmentation share."""

OPERATIONS = (
    "none", "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
    "PosterizeOriginal", "SolarizeOriginal", "ColorOriginal", "ContrastOriginal", "SharpnessOriginal",
    "JitterBrightness", "JitterContrast", "JitterSaturation",
)  # fmt: skip
"""An index into this names an operation, in drawn tables too: new ones come at the end.

The first fifteen after "none" are RandAugment's, in the -Increasing and -Rel flavors of timm's. -Original: as
AutoAugment reads a magnitude (timm's PosterizeOriginal, and its Solarize, Color, Contrast and Sharpness without a
suffix). Jitter-: color jitter's, whose magnitude is the factor of the blend itself.
"""

RANDAUGMENT = 15
"""Operations that RandAugment chooses from: OPERATIONS[1:16]."""
FIRST_JITTER = OPERATIONS.index("JitterBrightness")
"""Index of the first of color jitter's three operations, which follow each other."""

AUTOAUGMENT = (
    (("PosterizeOriginal", 0.4, 8), ("Rotate", 0.6, 9)),
    (("SolarizeOriginal", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("PosterizeOriginal", 0.6, 7), ("PosterizeOriginal", 0.6, 6)),
    (("Equalize", 0.4, 7), ("SolarizeOriginal", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("SolarizeOriginal", 0.6, 3), ("Equalize", 0.6, 7)),
    (("PosterizeOriginal", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("SolarizeOriginal", 0.6, 8)),
    (("Equalize", 0.6, 8), ("PosterizeOriginal", 0.4, 6)),
    (("Rotate", 0.8, 8), ("ColorOriginal", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("ColorOriginal", 0.6, 4), ("ContrastOriginal", 1.0, 8)),
    (("Rotate", 0.8, 8), ("ColorOriginal", 1.0, 2)),
    (("ColorOriginal", 0.8, 8), ("SolarizeOriginal", 0.8, 7)),
    (("SharpnessOriginal", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("ColorOriginal", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("SolarizeOriginal", 0.2, 4)),
    (("SolarizeOriginal", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("ColorOriginal", 0.6, 4), ("ContrastOriginal", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)
"""ImageNet's 25 sub-policies: two times (operation, probability, magnitude), one after the other.

Source: Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", arXiv 1805.09501, table 9, with
magnitudes read as timm's policy `original` reads them. DeiT's ablation says "AutoAugment" and cites that paper; its
code takes the policy's name as an option and leaves it open whether `original` or `v0` (EfficientNet's) was meant.
"""
