"""ImageNet-like JPEGs for the loader's benchmark: 500x375, cut out of photographs that are installed."""

import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from data_prep.make_sample import PHOTOGRAPHS

WIDTH, HEIGHT, CLASSES = 500, 375, 8


def photographs() -> list[Image.Image]:
    """Those of scikit-image and scikit-learn, as far as they are installed, that are large enough."""
    found = []
    for package, file in [*PHOTOGRAPHS.values(), ("skimage", "data/motorcycle_left.png")]:
        spec = find_spec(package)
        path = Path(spec.origin).parent / file if spec is not None and spec.origin is not None else None
        if path is not None and path.exists():
            with Image.open(path) as image:
                if image.mode == "RGB" and image.width >= WIDTH and image.height >= HEIGHT:
                    found.append(image.copy())
    return found


def make_images(folder: Path, count: int, quality: int) -> str:
    """Write ``count`` JPEGs as a folder per class; returns what they are, in words.

    Each is another crop of a photograph, mirrored or not, at its own size or shrunk: nothing is enlarged, which
    would leave few details to decode.
    """
    sources, rng, total = photographs(), random.Random(0), 0
    if not sources:
        raise SystemExit("the images are cut out of scikit-image's photographs: pip install scikit-image")
    for i in range(count):
        image = sources[i % len(sources)]
        scale = rng.uniform(1, min(image.width / WIDTH, image.height / HEIGHT))
        left, top = rng.uniform(0, image.width - scale * WIDTH), rng.uniform(0, image.height - scale * HEIGHT)
        box = (left, top, left + scale * WIDTH, top + scale * HEIGHT)
        crop = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, "JPEG", quality=quality)
        total += path.stat().st_size
    return (
        f"{count} JPEGs of {WIDTH}x{HEIGHT}, quality {quality}, {total / count / 1000:.0f} kB each on average, "
        f"cut out of {len(sources)} photographs"
    )
