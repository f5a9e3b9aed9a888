"""Sizes of the CLIP that tests make with random weights."""

TINY_VISION = {"image_size": 112, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TINY_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
