"""Sources in miniature: ImageNet's tars, shards of other tools, Parquet files."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.data.pictures import encode, picture

# ILSVRC2012 numbers its classes in another order than that of the WordNet ids.
WNIDS = {1: "n02119789", 2: "n01440764", 3: "n02110958"}
TRUTH = [2, 3, 1, 1, 2]  # class of each validation image


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpacked_imagenet(folder: Path) -> Path:
    """The training images as a folder tree: 3 classes of 4, 5 and 6 images."""
    for c, wnid in enumerate(sorted(WNIDS.values())):
        (folder / wnid).mkdir(parents=True)
        for i in range(4 + c):
            (folder / wnid / f"{wnid}_{i * 7}.JPEG").write_bytes(encode(picture(10 * c + i, (40 + i, 30))))
    return folder


def imagenet_train(folder: Path, path: Path) -> Path:
    """``folder``, as ``unpacked_imagenet`` made it, as ImageNet's tar of tars, in a disorderly order."""
    classes = sorted(folder.iterdir(), reverse=True)
    inner = [
        (f"{c.name}.tar", tar([(f.name, f.read_bytes()) for f in sorted(c.iterdir(), reverse=True)])) for c in classes
    ]
    path.write_bytes(tar(inner))
    return path


def imagenet_validation(path: Path) -> list[bytes]:
    images = [encode(picture(50 + i)) for i in range(len(TRUTH))]
    path.write_bytes(tar([(f"ILSVRC2012_val_{i:08d}.JPEG", data) for i, data in enumerate(images, 1)]))
    return images


def devkit(folder: Path, truth: list[int] = TRUTH) -> Path:
    """The two files of the devkit that matter; a class of the hierarchy is among the synsets."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, "a name, or two", 0) for number, wnid in WNIDS.items()] + [(4, "n00001740", "entity", 3)]
    data = folder / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=fields)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in truth))
    return folder


def packed_devkit(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, arcname="ILSVRC2012_devkit_t12")
    return path


def foreign_shards(folder: Path, shards: int = 2, each: int = 3) -> Path:
    """Shards as other tools write them: several members a sample, the image in the middle, labels but no names."""
    folder.mkdir()
    for s in range(shards):
        members = [("__meta__", b"made elsewhere")]
        for i in range(each):
            key = f"part.{s}/{s:02d}{i:04d}"
            members += [(f"{key}.cls", b"%d\n" % (i % 2)), (f"{key}.JPG", encode(picture(10 * s + i)))]
            members += [(f"{key}.json", json.dumps({"url": "x"}).encode()), (f"{key}.seg.png", b"?")]
        (folder / f"{s:05d}.tar").write_bytes(tar(members))
    return folder
