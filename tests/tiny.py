"""What several tests make of random weights: sizes of a CLIP, and adapters that matter; processes, and the files that they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

TINY_VISION = {"image_size": 112, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TINY_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
"""Of processes that import the package and what lies beside this file."""


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


def picture_folder(root, **classes):
    """A folder of so many pictures a class; red tells the class, green the number. ``{"a/b": 3}`` makes folders in folders."""
    for c, (name, n) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (40 * c, 9 * i % 256, 0)).save(root / name / f"{i}.png")
    return root


def inputs(clip, data, rows=None):
    """Pictures of a data set as the model reads them, [n, 3, H, W]."""
    return torch.stack([clip.preprocess(data[int(i)].image) for i in (range(len(data)) if rows is None else rows)])


def assert_same_files(one, other):
    """Byte for byte, in all folders below two."""
    ours, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} for folder in (one, other)
    )
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []


def killed(out, what):
    """What ``kills.py`` says of its runs into ``out``."""
    command = [sys.executable, HERE / "kills.py", out, json.dumps(what)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


class Changed:
    """A model or data set some of whose attributes are others; special methods are not passed on."""

    def __init__(self, original, **changes):
        self.__dict__.update(changes, original=original)

    def __getattr__(self, name):
        return getattr(self.__dict__["original"], name)


def loud(adapter, clip):
    """An adapter whose random prompts are large enough to matter."""
    adapted = adapter(clip, n_ctx=2, seed=1)
    for parameter in adapted.learned.parameters():
        parameter.mul_(20)
    return adapted


def owed(clip, sae, residual, head, layer=-2, h=None):
    """What the logit of the predicted class owes to each latent of each image, [B, S]."""
    from patchsae_utils.interventions.attribution import latent_shares
    from patchsae_utils.interventions.tail import network_tail

    classes = clip.logits(clip.finish(residual, layer), head).argmax(1)
    with torch.no_grad():
        return latent_shares(clip, sae, network_tail(clip, layer, residual), residual, head, classes, h=h)
