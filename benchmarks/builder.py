"""Images a second of the shard builder, beside plain WebDataset loops and, where it is installed, img2dataset.

    python benchmarks/builder.py [--images 4000] [--rounds 5] [--workers 2] [--img2dataset /path/to/its/python]

All put the same folder of ImageNet-like JPEGs (see ``loader_images``) into WebDataset tars of 1000 samples and keep the
files' bytes. Each run is a process of its own; its seconds begin after the imports and end when the last shard is
closed. The ways take turns in every round, so that whatever else the machine does meets all of them alike. The files
are in the page cache. ``--memory`` builds from many links to the images instead and prints the memory over time.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from loader_images import make_images

SHARD, QUALITY = 1000, 90  # samples; of the JPEGs
WAYS = {
    "ours": "every image decoded, checksums, index, synced to disk",
    "ours, one process": "the same with --workers 1",
    "ShardWriter, decoding": "webdataset.ShardWriter in a loop; Pillow decodes every image",
    "ShardWriter, unchecked": "webdataset.ShardWriter in a loop; nothing is decoded",
    "img2dataset": "file:// URLs, bytes kept (resize_mode no, skip_reencode), decoded by OpenCV",
}


class Cost(NamedTuple):
    """Seconds of a run, and seconds of all processors, both without imports."""

    seconds: float
    cpu: float


def ours(images: Path, out: Path, workers: int) -> Cost:
    from data_prep.build import BuildOptions, build

    return timed(lambda: build(images, out, BuildOptions(shard_count=SHARD), workers))


def plain(images: Path, out: Path, decode: bool) -> Cost:
    """The loop that WebDataset's documentation shows."""
    import webdataset
    from PIL import Image

    def loop() -> None:
        label = {name: i for i, name in enumerate(sorted(folder.name for folder in images.iterdir()))}
        paths = sorted(images.glob("*/*.jpg"))
        with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=SHARD, verbose=0) as sink:
            for path in paths:
                data = path.read_bytes()
                if decode:
                    with Image.open(io.BytesIO(data)) as image:
                        image.convert("RGB")
                name = path.parent.name
                sink.write({"__key__": f"{name}/{path.stem}", "jpg": data, "cls": label[name]})

    out.mkdir()
    return timed(loop)


def img2dataset(images: Path, out: Path, workers: int, python: str) -> Cost:
    """img2dataset in the interpreter that has it; its processes' imports are part of its own work."""
    urls, script = out.with_suffix(".txt"), out.with_suffix(".py")
    urls.write_text("".join(f"file://{path}\n" for path in sorted(images.glob("*/*.jpg"))))
    script.write_text(
        "import os, sys, time\nfrom img2dataset import download\nif __name__ == '__main__':\n"
        " started, cpu = time.perf_counter(), sum(os.times()[:4])\n"
        " download(url_list=sys.argv[1], output_folder=sys.argv[2], processes_count=int(sys.argv[3]), thread_count=4,"
        f" number_sample_per_shard={SHARD}, output_format='webdataset', resize_mode='no', skip_reencode=True,"
        " disallowed_header_directives=[])\n"
        " print('cost', time.perf_counter() - started, sum(os.times()[:4]) - cpu)\n"
    )
    command = [python, str(script), str(urls), str(out), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"})
    if done.returncode:
        raise SystemExit(f"img2dataset failed:\n{done.stderr[-2000:]}")
    stored = sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))
    if stored != len(list(images.glob("*/*.jpg"))):
        raise SystemExit(f"img2dataset stored {stored} images only")
    seconds, cpu = map(float, done.stdout.rpartition("cost ")[2].split())
    return Cost(seconds, cpu)


def timed(action: Callable[[], object]) -> Cost:
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    action()
    return Cost(time.perf_counter() - started, sum(os.times()[:4]) - cpu)


def run_way(way: str, images: Path, out: Path, workers: int, python: str) -> Cost:
    if way == "img2dataset":
        return img2dataset(images, out, workers, python)
    if way.startswith("ours"):
        return ours(images, out, 1 if way.endswith("one process") else workers)
    return plain(images, out, way.endswith("decoding"))


def measure(way: str, images: Path, out: Path, arguments: argparse.Namespace) -> Cost:
    """One run, in a process of its own; its output is removed."""
    command = [sys.executable, __file__, "--run", way, "--folder", str(images), "--out", str(out)]
    command += ["--workers", str(arguments.workers), "--img2dataset", arguments.img2dataset or ""]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    shutil.rmtree(out)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def memory(images: Path, links: int, out: Path, workers: int) -> None:
    """Build from ``links`` links to ``images`` and print the resident memory of all its processes every few seconds."""
    import psutil

    source = images.with_name("links")
    originals = sorted(images.glob("*/*.jpg"))
    for i in range(links):
        path = source / f"class{i % 100}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(originals[i % len(originals)])
    command = [sys.executable, "-m", "data_prep", "build", str(source), str(out), "--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as build:
        started = time.perf_counter()
        while build.poll() is None:
            processes = [psutil.Process(build.pid), *psutil.Process(build.pid).children()]
            used = [process.memory_full_info().uss / 1e6 for process in processes if process.is_running()]
            shards = len(list(out.glob("shard-*.tar"))) if out.exists() else 0
            print(f"{time.perf_counter() - started:6.0f} s  {shards:4d} shards  own memory of each process, MB:",
                  ", ".join(f"{value:.0f}" for value in used), flush=True)  # fmt: skip
            time.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="interpreter of an environment with img2dataset")
    parser.add_argument("--memory", type=int, metavar="LINKS", help="print the memory of a build of LINKS images")
    parser.add_argument("--folder", type=Path, help="images made before; also with --run")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        cost = run_way(arguments.run, arguments.folder, arguments.out, arguments.workers, arguments.img2dataset)
        print(json.dumps(cost))
        return
    with tempfile.TemporaryDirectory() as temporary:
        images = arguments.folder or Path(temporary) / "images"
        print(make_images(images, arguments.images, QUALITY) if not images.exists() else images)
        if arguments.memory:
            memory(images, arguments.memory, Path(temporary) / "out", arguments.workers)
            return
        count = len(list(images.glob("*/*.jpg")))
        ways = [way for way in WAYS if way != "img2dataset" or arguments.img2dataset]
        runs: dict[str, list[Cost]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way in ways:
                runs[way].append(measure(way, images, Path(temporary) / "out", arguments))
        for way in ways:
            print_way(way, runs[way], runs["ShardWriter, decoding"], count)


def print_way(way: str, runs: list[Cost], loop: list[Cost], count: int) -> None:
    rates = [count / seconds for seconds, _ in runs]
    faster = statistics.median(theirs / own for (own, _), (theirs, _) in zip(runs, loop, strict=True))
    cpu = statistics.median(cpu for _, cpu in runs) / count * 1000
    print(f"{way:24s} {statistics.median(rates):6,.0f} images/s ({min(rates):,.0f} to {max(rates):,.0f}), "
          f"{faster:.2f} times ShardWriter with decoding; {cpu:.2f} ms of a core per image; {WAYS[way]}")  # fmt: skip


if __name__ == "__main__":
    main()
