"""The networks: ViT and DeiT, CNN baselines, and the names of their classes."""
