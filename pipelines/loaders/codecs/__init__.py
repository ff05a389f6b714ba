"""Decoders of single images on the host: nvImageCodec for `cpu`, Pillow for `reference`."""
