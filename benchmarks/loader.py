"""Images per second of one core, from ImageNet-like JPEGs to augmented 224-pixel views, of this and other loaders.

    python benchmarks/loader.py [--images N] [--rounds N] [--quality Q] [--quick] [--turbojpeg FILE] [--others PYTHON]
        [--json FILE]

All ways read the same images in one run, on one core and without worker processes, in turns: a round is an epoch of
each. Time is processor time, which others on the machine hardly disturb; ratios are medians over the rounds. Other
loaders run under --others, the Python of an environment of their own (pip install litdata mosaicml-streaming ffcv);
those it lacks are left out, with the reason. With a libturbojpeg of version 3 (see ummim/data/turbojpeg.py), ours reads
crops alone as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loader_images import make_images
from loader_ways import SIZE, Way, bare_crops, bare_decode, decoding, mae, masks, ours, plain_webdataset
from PIL import Image

from data_prep.__main__ import main as data_prep
from ummim.data import Augment, DataConfig, ShardIndex, decode
from ummim.data.shards import ShardReader
from ummim.data.turbojpeg import TurboJpeg, turbojpeg

OTHERS = ("ffcv", "streaming", "litdata")
Timer = Callable[[], tuple[float, float]]  # an epoch's processor time and time, seconds per image
MAE, BARE, BARE_CROPS = "MAE: ImageFolder + PIL", "libjpeg-turbo's decode alone", "libjpeg-turbo's decode of crops"
RESIZED_CROPS = "decode of crops, and the resize"
OURS, THROWING = "ummim, random 75%", "ummim, PR-MIM"
CROPS, MASKS = ", crops alone", "masks of "


def timer(way: Way) -> Timer:
    def epoch() -> tuple[float, float]:
        processor, clock = time.process_time(), time.perf_counter()
        count = way()
        return (time.process_time() - processor) / count, (time.perf_counter() - clock) / count

    return epoch


def other(name: str, python: str, images: Path, folder: Path, batch: int) -> Timer | str:
    """Start another loader's process; the reason if it cannot be had."""
    script = str(Path(__file__).with_name("loader_others.py"))
    errors = folder.with_suffix(".log")
    with errors.open("w") as log:
        process = subprocess.Popen(
            [python, "-W", "ignore", script, name, str(images), str(folder), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    to, back = process.stdin, process.stdout
    for line in back:
        if line == '"ready"\n':
            break
    else:
        return (errors.read_text().strip().splitlines() or ["it ended"])[-1]

    def epoch() -> tuple[float, float]:
        to.write("\n")
        to.flush()
        processor, clock, count = json.loads(back.readline())
        return processor / count, clock / count

    return epoch


def our_ways(index: ShardIndex, batch: int, library: TurboJpeg | None) -> dict[str, Timer]:
    ways = {BARE: bare_decode(index, batch)}
    for name, throw_ratio in ((OURS, 0.0), (THROWING, 0.5)):
        ways[name] = decoding(ours(index, batch, throw_ratio), None)
        if library is not None:
            ways[name + CROPS] = decoding(ours(index, batch, throw_ratio), library)
        ways[MASKS + name] = masks(index, batch, throw_ratio)
    if library is not None:
        ways[BARE_CROPS] = bare_crops(index, batch, library)
        ways[RESIZED_CROPS] = bare_crops(index, batch, library, resized=True)
    return {name: timer(way) for name, way in ways.items()}


def agreement(index: ShardIndex) -> str:
    """How far views are from Pillow's decode, crop and resize at the same places."""
    reader, augment, worst, squares, differ = ShardReader(index), Augment(DataConfig("", image_size=SIZE)), 0, [], []
    for row in range(len(index)):
        data = reader.read(row)
        view, box = augment.located_view(data, row)
        image = decode(data)
        left, right = sorted((round(box.left * image.width), round(box.right * image.width)))
        crop = image.crop((left, round(box.top * image.height), right, round(box.bottom * image.height)))
        crop = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if box.left > box.right:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        gap = np.abs(view.permute(1, 2, 0).numpy().astype(int) - np.asarray(crop))
        worst = max(worst, int(gap.max()))
        squares.append((gap**2).mean())
        differ.append((gap > 0).mean())
    reader.close()
    psnr = 10 * np.log10(255**2 / np.mean(squares))
    return f"{len(index)} crops and Pillow's: {psnr:.1f} dB, {np.mean(differ):.2%} of values differ, by {worst} at most"


def measure(ways: dict[str, Timer], rounds: int) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, epoch in ways.items():
            times[name].append(epoch())
        if sys.stderr.isatty():
            print(f"\rround {turn} of {rounds}", end="", file=sys.stderr)
    return {name: each[1:] for name, each in times.items()}  # the first round warms up


def ratio(times: dict[str, list[tuple[float, float]]], slow: str, fast: str) -> float:
    return statistics.median(a[0] / b[0] for a, b in zip(times[slow], times[fast], strict=True))


def report(times: dict[str, list[tuple[float, float]]]) -> list[str]:
    lines = [f"{'':32}{'images/s':>10}{'us/image':>10}{'x MAE':>8}{'x decode':>10}{'us, wall':>10}"]
    for name, each in times.items():
        processor, clock = (statistics.median(column) for column in zip(*each, strict=True))
        lines.append(
            f"{name:32}{1 / processor:10.0f}{processor * 1e6:10.0f}{ratio(times, MAE, name):8.2f}"
            f"{ratio(times, name, BARE):10.2f}{clock * 1e6:10.0f}"
        )
    for name in (OURS, OURS + CROPS, THROWING, THROWING + CROPS):
        if name in times:
            part = MASKS + name.removesuffix(CROPS)
            lines.append(f"masks' share of {name}: {ratio(times, part, name):.2%}")
    if BARE_CROPS in times:
        for name in (OURS + CROPS, RESIZED_CROPS):
            lines.append(f"{name}, to the bare decode of crops: {ratio(times, name, BARE_CROPS):.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=512, help="images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images per batch (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="128 images, 2 rounds: to see that it runs")
    parser.add_argument("--turbojpeg", metavar="FILE", help="a libturbojpeg; else that which training would find")
    parser.add_argument("--others", metavar="PYTHON", help="the Python that has the other loaders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time that was taken")
    options = parser.parse_args()
    images, rounds = (128, 2) if options.quick else (options.images, options.rounds)

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tree, shards = Path(folder) / "images", Path(folder) / "shards"
        print(make_images(tree, images, options.quality))
        if data_prep(["build", str(tree), str(shards), "--shard-count", "128", "--workers", "1"]):
            raise SystemExit(1)
        index, batch = ShardIndex.open(shards), options.batch
        print(agreement(index))
        ways = our_ways(index, batch, TurboJpeg(options.turbojpeg) if options.turbojpeg else turbojpeg())
        ways = {MAE: timer(mae(tree, batch)), "webdataset + PIL": timer(plain_webdataset(shards, batch)), **ways}
        for name in OTHERS if options.others else ():
            found = other(name, options.others, tree, Path(folder) / name, batch)
            if isinstance(found, str):
                print(f"{name} is left out: {found}")
            else:
                ways[name] = found
        times = measure(ways, rounds)
        print("\n".join(report(times)))
    if options.json:
        options.json.write_text(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
