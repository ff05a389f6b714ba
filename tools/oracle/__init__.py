"""What deitfast is held against: timm, Pillow and torchvision, plain readings of the recipe, and images to try."""
