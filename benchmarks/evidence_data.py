"""The two labelled sets of evidence.py, as shards: Fashion-MNIST, and openclipart's drawings by folder."""

import csv
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
CLIPART = Path("/usr/share/openclipart/png")  # Debian's openclipart-png


@dataclass(frozen=True)
class Set:
    """Shards of one set.

    Attributes:
        name: of the set.
        folder: below it lie ``pretraining``, ``test`` and, for each seed, ``labels-<seed>``.
        classes: number of classes.
        epochs: over the labels of a seed; about 5000 images in all.
    """

    name: str
    folder: Path
    classes: int
    epochs: int

    def shards(self, part: str) -> str:
        return str(self.folder / part)


def fashion(folder: Path, seeds: int, pretraining: int, labels: int, test: int) -> Set:
    """``pretraining`` and ``labels`` of the 60,000 training images, ``test`` of the 10,000."""
    train, held_out = (FASHION / f"{name}-images-idx3-ubyte.gz" for name in ("train", "t10k"))
    build(train, folder / "pretraining", "--limit", pretraining)
    build(held_out, folder / "test", "--limit", test)
    for seed in range(seeds):
        build(train, folder / f"labels-{seed}", "--limit", labels, "--shuffle-seed", seed + 1)
    return Set("fashion", folder, 10, epochs=5000 // labels)


def clipart(folder: Path, seeds: int, pretraining: int, labels: int, least: int) -> Set:
    """Classes are the sub-folders, such as animals/mammals, of at least ``least`` drawings.

    ``labels`` drawings of each class are a seed's labels; up to a hundred others of each are the test; what is in no
    test may be pre-trained on. Near-copies, of which the collection has many, may lie on both sides.
    """
    by_class = defaultdict(list)
    for path in sorted(CLIPART.glob("*/*/*.png")):
        by_class["/".join(path.relative_to(CLIPART).parts[:2])].append(path)
    classes = {name: paths for name, paths in sorted(by_class.items()) if len(paths) >= least}
    draw = random.Random(0)
    tests: dict[str, list[Path]] = {}
    for name, paths in classes.items():
        draw.shuffle(paths)
        tests[name] = paths[: min(100, len(paths) - 2 * labels)]
    tested = {path for paths in tests.values() for path in paths}
    rest = [path for path in sorted(CLIPART.rglob("*.png")) if path not in tested]
    parts: dict[str, list[tuple[Path, str]]] = {
        "pretraining": [(path, "") for path in rest],
        "test": [(path, name) for name, paths in tests.items() for path in paths],
    }
    for seed in range(seeds):
        known = {name: [path for path in paths if path not in tested] for name, paths in classes.items()}
        chosen = random.Random(seed)
        parts[f"labels-{seed}"] = [
            (path, name) for name, paths in known.items() for path in chosen.sample(paths, labels)
        ]
    for part, rows in parts.items():
        manifest = folder / f"{part}.csv"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label") if part != "pretraining" else ("path",))
            writer.writerows(row if part != "pretraining" else row[:1] for row in rows)
        size = ("--limit", pretraining) if part == "pretraining" else ()
        build(manifest, folder / part, "--root", CLIPART, "--short-side", 144, "--max-bad", 0.1, *size)
    return Set("clipart", folder, len(classes), epochs=5000 // (labels * len(classes)))


def build(source: Path, target: Path, *more: object) -> None:
    """``python -m data_prep build``, which goes on or does nothing where it has run before."""
    words = [sys.executable, "-m", "data_prep", "build", source, target, "--workers", 1, *more]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
