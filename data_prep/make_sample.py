"""Makes the bundled sample: crops of freely licensed photographs that scikit-image and scikit-learn install.

    python -m data_prep.make_sample ummim/sample_images

Needs ``pip install scikit-image scikit-learn``; downloads nothing. The same versions give the same files. The
origin and licence of every photograph stand in the folder's LICENSES.md, kept by hand.
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from ummim.errors import DataError, run_main

CROPS, SIDE, QUALITY = 10, 256, 88
PHOTOGRAPHS = {  # class: (package, file in it)
    "astronaut": ("skimage", "data/astronaut.png"),
    "cameraman": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}


def crops(image: Image.Image, count: int, side: int, seed: int) -> list[Image.Image]:
    """``count`` square RGB crops: the centre, then random ones of 75 to 100% of the short side."""
    rng = random.Random(seed)
    image = image.convert("RGB")
    short = min(image.size)
    found = []
    for i in range(count):
        size = short if i == 0 else round(short * rng.uniform(0.75, 1.0))
        left = (image.width - size) // 2 if i == 0 else rng.randint(0, image.width - size)
        top = (image.height - size) // 2 if i == 0 else rng.randint(0, image.height - size)
        box = (left, top, left + size, top + size)
        found.append(image.resize((side, side), Image.Resampling.LANCZOS, box=box))
    return found


def make_sample(folder: Path) -> str:
    """Write ``folder/<class>/<class>-<n>.jpg``; returns a summary."""
    total = 0
    for seed, (name, (package, file)) in enumerate(PHOTOGRAPHS.items()):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError("the sample needs two packages: pip install scikit-image scikit-learn")
        (folder / name).mkdir(parents=True, exist_ok=True)
        with Image.open(Path(spec.origin).parent / file) as image:
            for i, crop in enumerate(crops(image, CROPS, SIDE, seed)):
                path = folder / name / f"{name}-{i}.jpg"
                crop.save(path, "JPEG", quality=QUALITY, optimize=True)
                total += path.stat().st_size
    return f"{len(PHOTOGRAPHS) * CROPS} images of {len(PHOTOGRAPHS)} photographs, {total / 1e6:.2f} MB: {folder}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the bundled sample images.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    return run_main(lambda: print(make_sample(folder)))


if __name__ == "__main__":
    raise SystemExit(main())
