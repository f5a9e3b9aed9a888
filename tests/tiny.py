"""What several tests make of random weights: sizes of a CLIP, and adapters that matter."""

import torch

TINY_VISION = {"image_size": 112, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TINY_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def random_clip():
    """A CLIP of random weights with our world's shapes: 112 px, patch 8, grid 14x14, 197 tokens; width 32, 3 blocks, embedding 16."""
    import open_clip
    from torchvision import transforms

    from patchsae_utils.clip.model import ClipModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=16, vision_cfg=TINY_VISION, text_cfg=TINY_TEXT)
    normalize = transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    preprocess = transforms.Compose([transforms.Resize((112, 112)), transforms.ToTensor(), normalize])
    tokenizer = open_clip.SimpleTokenizer(context_length=TINY_TEXT["context_length"])
    return ClipModel(model, name="tiny", preprocess=preprocess, tokenizer=tokenizer)


def loud(adapter, clip):
    """An adapter whose random prompts are large enough to matter."""
    adapted = adapter(clip, n_ctx=2, seed=1)
    for parameter in adapted.learned.parameters():
        parameter.mul_(20)
    return adapted
