"""Run by shares.py: trains the same SAEs in however many processes there are."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from tiny_training import Store, fresh

from patchsae_utils.activations.streaming import TokenStream
from patchsae_utils.config import TrainConfig
from patchsae_utils.sae.trainer import train_sae

SETTINGS = {
    "n_tokens": 60 * 63, "batch_tokens": 63, "lr": 3e-3, "warmup_steps": 10, "l1_coefficient": 1e-3, "clip_gradient": 0.5, "dead_after_tokens": 4 * 63,
    "log_every": 3, "checkpoint_every": 7, "cls_coefficient": 2.0,
}  # fmt: skip
RUNS = {"relu": {}, "sparse": {"sparse": "always"}, "data": {"start": "data", "normalize": "mean"}}


class Picture:
    def __init__(self, index):
        self.image, self.label, self.index = index, 0, index


class Pictures(torch.utils.data.Dataset):
    """Ten images, told apart by their number."""

    spec = name = "pictures"
    split, labels, class_names = "train", [0] * 10, ["one"]

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return Picture(index)


class Model:
    """Stands for a CLIP: an image's tokens follow from its number."""

    name, pretrained, weights_hash, fingerprint, grid, n_tokens, width = "toy", None, "0", "toy", (2, 2), 5, 8
    device = torch.device("cpu")

    def __init__(self):
        self.seen = []

    def preprocess(self, index):
        return torch.tensor(index)

    def layer_index(self, layer):
        return 1

    def check_class_token(self, tokens):
        pass

    def residual(self, images, layer):
        self.seen += images.tolist()
        return torch.stack([5 + torch.randn(5, 8, generator=torch.Generator().manual_seed(int(i))) for i in images])


def main(out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, changes in RUNS.items():
        train_sae(fresh(), Store(), TrainConfig(**SETTINGS | changes), out / name, progress=False)
    try:
        train_sae(fresh(), Store(stop_at=40), TrainConfig(**SETTINGS), out / "resumed", progress=False)
    except KeyboardInterrupt:
        pass
    train_sae(fresh(), Store(), TrainConfig(**SETTINGS), out / "resumed", progress=False)
    train_sae(fresh(activation="batchtopk", k=4), Store(), TrainConfig(**SETTINGS), out / "batchtopk", progress=False)

    model = Model()
    stream = TokenStream(model, Pictures(), batch_size=2, buffer_bytes=1)
    train_sae(fresh(), stream, TrainConfig(**SETTINGS | {"n_tokens": 20 * 20, "batch_tokens": 20}), out / "stream", progress=False)
    state = PartialState()
    (out / f"images-{state.process_index}").write_text(str(len(model.seen)))

    (out / "broken").mkdir(exist_ok=True)
    (out / "broken" / "checkpoint.pt").write_bytes(b"no checkpoint")
    try:
        train_sae(fresh(), Store(), TrainConfig(**SETTINGS), out / "broken", progress=False)
    except ValueError as error:
        (out / f"error-{state.process_index}").write_text(str(error))
    train_sae(fresh(), Store(), TrainConfig(**SETTINGS), out / "relu", progress=False)  # opened, by all


if __name__ == "__main__":
    main(Path(sys.argv[1]))
