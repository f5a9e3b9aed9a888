"""What several tests make of random weights: sizes of a CLIP, and adapters that matter."""

TINY_VISION = {"image_size": 112, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TINY_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def loud(adapter, clip):
    """An adapter whose random prompts are large enough to matter."""
    adapted = adapter(clip, n_ctx=2, seed=1)
    for parameter in adapted.learned.parameters():
        parameter.mul_(20)
    return adapted
