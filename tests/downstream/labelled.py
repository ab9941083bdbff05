"""Small labelled shards, and the recipe of a small fine-tuning on them."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.__main__ import main as data_prep

RECIPE = """
description: a fine-tuning small enough for a test
classify:
  encoder: {kind: vit, patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2}
  classes: 3
  layer_decay: 0.75
  val_shards: VAL
epochs: 3
global_batch: 8
micro_batch: 4
optim: {base_lr: 2.0e-3, reference_batch: 8, betas: [0.9, 0.999], warmup_epochs: 1}
data: {shards: TRAIN, image_size: 32, workers: 0, streams: 2, window: 1}
zero_stage: 2
precision: fp32
log_every: 2
checkpoint_every: 1000
tensorboard: false
output: OUTPUT
"""


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """``count`` pictures in three class folders; a class is a colour, and a size between 36 and 60 pixels a whim."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 120, (6, 6, 3), dtype=np.uint8)
        pixels[..., i % 3] += 100
        path = folder / ["blue", "green", "red"][2 - i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = tuple(rng.integers(36, 61, 2).tolist())
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return folder


def build_shards(folder: Path, train: int = 24, val: int = 21) -> Path:
    """``folder/train`` and ``folder/val``; returns ``folder``."""
    for seed, (name, count) in enumerate({"train": train, "val": val}.items()):
        tree = write_pictures(folder / f"{name}-pictures", count, seed)
        assert data_prep(["build", str(tree), str(folder / name), "--shard-count", "5", "--workers", "1"]) == 0
    return folder


def write_recipe(folder: Path, output: Path, text: str = RECIPE) -> Path:
    """The recipe on the shards in ``folder``; returns its file."""
    for word, value in (("TRAIN", folder / "train"), ("VAL", folder / "val"), ("OUTPUT", output)):
        text = text.replace(word, str(value))
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path
