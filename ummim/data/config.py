"""The ``data`` section of a recipe."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ummim.data.cache import DEFAULT_SIZE, ShardCache, default_folder, parse_size
from ummim.data.index_files import shards_url
from ummim.data.urls import is_url, local_path
from ummim.errors import RecipeError


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, how they are augmented, and in which order they are read.

    Attributes:
        shards: folder of tar shards with their index, as ``python -m data_prep build`` makes it, or its URL (http,
            https, s3, gs, or another that fsspec knows); or a folder with the index of shards behind a URL, as
            ``python -m data_prep index URL --out`` makes it.
        workers: worker processes per rank that read, decode, augment and mask; 0 does it in the trainer.
        image_size: side of the square training crop, in pixels.
        crop: ``resized`` takes a crop of random area and shape and resizes it (MAE and most others); ``padded``
            resizes the shorter side to ``image_size``, pads the image by 4 reflected pixels on every side and takes
            a crop of that size anywhere (MFF), so that objects keep their scale.
        crop_scale: area of the resized crop as a share of the image's, (smallest, largest). MAE: (0.2, 1.0).
        crop_ratio: aspect ratio (width / height) of the resized crop, (smallest, largest).
        interpolation: filter of the resizing; always antialiased. MAE: bicubic.
        hflip: probability of a horizontal flip.
        streams: shards of an epoch are dealt to this many streams, and a global batch takes samples from them
            in turn. Part of the order, not of the hardware: it decides which samples meet in a batch.
        window: within a stream, samples are shuffled among this many consecutive shards. ``streams * window``
            shards are read at a time; more mixes better, fewer keeps fewer files open.
        cache: folder on this machine's own disk for copies of whole shards, shared by all its processes. None: one
            below the system's folder for temporary files if the shards are behind a URL; else no copies.
        cache_size: what the copies may take, such as 100GB or 1.5TB; the least recently used make room for others.
        retry_seconds: how long to go on asking a server that fails, without progress, before giving up.
        max_bad: share of an epoch's samples that may turn out unreadable, and be replaced by others, before the run
            stops; 0 stops it at the first. Counted anew in each epoch and after each start.
        worker_restarts: how many times dead worker processes are started anew before the run stops.
    """

    shards: str
    workers: int = 8
    image_size: int = 224
    crop: Literal["resized", "padded"] = "resized"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    hflip: float = 0.5
    streams: int = 16
    window: int = 4
    cache: str | None = None
    cache_size: str = DEFAULT_SIZE
    retry_seconds: float = 300
    max_bad: float = 0.001
    worker_restarts: int = 3

    def validate(self) -> None:
        """Raise ``RecipeError`` for the first field whose value cannot work."""
        for name, least in (("workers", 0), ("image_size", 1), ("streams", 1), ("window", 1),
                            ("worker_restarts", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise RecipeError(f"must be at least {least}", key=f"data.{name}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise RecipeError("must be (smallest, largest) with 0 < smallest <= largest <= 1", "data.crop_scale")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise RecipeError("must be (smallest, largest) with 0 < smallest <= largest", "data.crop_ratio")
        if not 0 <= self.hflip <= 1:
            raise RecipeError("is a probability: choose a value between 0 and 1", "data.hflip")
        if not self.retry_seconds >= 0:
            raise RecipeError("must be at least 0", "data.retry_seconds")
        try:
            parse_size(self.cache_size)
        except ValueError:
            raise RecipeError("must be a number and a unit: kB, MB, GB, TB or KiB to TiB", "data.cache_size") from None
        if not 0 <= self.max_bad <= 1:
            raise RecipeError("is a share of an epoch's samples: choose a value between 0 and 1", "data.max_bad")

    def shard_cache(self) -> ShardCache | None:
        """The cache that the shards are read through, if any. Raises ``DataError`` if the default one is not ours."""
        remote = is_url(self.shards) or shards_url(Path(local_path(self.shards))) is not None
        if self.cache is None and not remote:
            return None
        folder = default_folder() if self.cache is None else Path(self.cache)
        return ShardCache(folder, parse_size(self.cache_size), self.retry_seconds)


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """The ``data`` section of an evaluation. Defaults are those of plain training; MAE's fine-tuning is in its recipe.

    Attributes:
        crop_scale: area of the resized crop as a share of the image's, (smallest, largest).
        randaugment: timm's RandAugment, such as ``rand-m9-mstd0.5-inc1`` (MAE); empty: none.
        color_jitter: strength of random brightness, contrast and saturation; only where there is no RandAugment.
        erasing: probability that a random rectangle of a training image is replaced by noise (timm's RandomErasing).
        eval_resize: shorter side, in pixels, that an image is resized to before its centre is cut out for evaluation.
            None: ``image_size`` / 0.875 up to 224 pixels, ``image_size`` above (MAE, UM-MAE). SimMIM: ``image_size``
            * 256 / 224 always.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    randaugment: str = ""
    color_jitter: float = 0.0
    erasing: float = 0.0
    eval_resize: int | None = None

    @property
    def eval_side(self) -> int:
        """The shorter side, in pixels, before the centre crop."""
        if self.eval_resize is not None:
            return self.eval_resize
        return int(self.image_size / 0.875) if self.image_size <= 224 else self.image_size

    def validate(self) -> None:
        """Raise ``RecipeError`` for the first field whose value cannot work."""
        super().validate()
        if not 0 <= self.erasing <= 1:
            raise RecipeError("is a probability: choose a value between 0 and 1", "data.erasing")
        if not 0 <= self.color_jitter <= 1:
            raise RecipeError("is a strength: choose a value between 0 and 1, such as 0.4", "data.color_jitter")
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise RecipeError(f"must be at least data.image_size = {self.image_size}", "data.eval_resize")
        if self.randaugment:
            check_randaugment(self.randaugment)


_RANDAUGMENT = re.compile(r"rand(?:-(?:m\d+|n\d+|p\d+(?:\.\d+)?|mstd\d+(?:\.\d+)?|mmax\d+|inc[01]))*")


def check_randaugment(text: str) -> None:
    """Refuse what timm's RandAugment does not read; it would pass over an unknown part of it in silence."""
    if not _RANDAUGMENT.fullmatch(text):
        raise RecipeError("is no RandAugment that timm knows; such as rand-m9-mstd0.5-inc1", "data.randaugment")
