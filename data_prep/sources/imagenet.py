"""The official ImageNet tars, read where they lie: keys and labels are those of the unpacked, sorted folder tree."""

import io
import re
import tarfile
from functools import partial
from operator import attrgetter

from data_prep.locations import exists, glob, is_folder, open_seekable, read
from data_prep.pool import ordered
from data_prep.sources.item import Item, Source, check_classes, make_key
from data_prep.tar import Member, sound_members
from ummim.data.shards import UNLABELLED
from ummim.data.urls import basename, join, parent
from ummim.errors import DataError

VALIDATION = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
_TRUTH, _SYNSETS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def train_source(path: str, unlabelled: bool, workers: int) -> Source:
    """A tar of tars, each named after its class, as ``ILSVRC2012_img_train.tar`` and ImageNet-21k's are.

    The keys, ``n01440764/n01440764_10026``, are those of a folder tree with a folder per class.

    Raises:
        DataError: a tar that is cut short or damaged, or that holds something else beside the tars.
    """
    with open_seekable(path) as file:
        tars = sorted(sound_members(file, path), key=attrgetter("name"))
    stray = next((tar.name for tar in tars if not tar.name.endswith(".tar")), None)
    if stray is not None:
        raise DataError(f"{path} holds tars and other files beside them ({stray}): it is not as ImageNet has it")
    classes = [basename(tar.name).removesuffix(".tar") for tar in tars]
    items: list[Item] = []
    used: set[str] = set()
    for label, found in enumerate(ordered(partial(_inside, path), tars, workers)):
        for member in sorted(found, key=attrgetter("name")):
            key = make_key(f"{classes[label]}/{member.name}", used)
            items.append(Item(key, path, UNLABELLED if unlabelled else label, member.size, member.offset, "range"))
    return Source(items, None if unlabelled else check_classes(path, classes))


def validation_source(path: str, devkit: str | None, unlabelled: bool) -> Source:
    """``ILSVRC2012_img_val.tar``; its labels are the devkit's, numbered in the order of the WordNet ids.

    Raises:
        DataError: a tar that is cut short or damaged, or a devkit that is missing or does not fit.
    """
    with open_seekable(path) as file:
        images = list(sound_members(file, path))
    numbers = [VALIDATION.fullmatch(image.name) for image in images]
    stray = next((image.name for image, match in zip(images, numbers, strict=True) if match is None), None)
    if stray is not None:
        raise DataError(f"{path} holds {stray} among ImageNet's validation images: it is not as ImageNet has it")
    used: set[str] = set()
    if unlabelled:
        keys = [(make_key(image.name, used), UNLABELLED, image) for image in images]
        return Source([_item(path, *key) for key in sorted(keys)], None)
    devkit = devkit or _devkit_beside(path)
    truth, wnids = _read_devkit(devkit)
    classes = sorted(wnids.values())
    label = {wnid: i for i, wnid in enumerate(classes)}
    keys = []
    for image, match in zip(images, numbers, strict=True):
        line = int(match[1]) if match else 0
        if not 1 <= line <= len(truth) or truth[line - 1] not in wnids:
            raise DataError(f"{devkit}: {_TRUTH} has no class for {image.name}: it is another version's devkit")
        wnid = wnids[truth[line - 1]]
        keys.append((make_key(f"{wnid}/{basename(image.name)}", used), label[wnid], image))
    return Source([_item(path, *key) for key in sorted(keys)], classes)


def _item(path: str, key: str, label: int, member: Member) -> Item:
    return Item(key, path, label, member.size, member.offset, "range")


def _inside(path: str, tar: Member) -> list[Member]:
    with open_seekable(path) as file:
        return list(sound_members(file, f"{path}: {tar.name}", tar.offset, tar.size))


def _devkit_beside(path: str) -> str:
    found = glob(f"{parent(path)}/ILSVRC2012_devkit*")
    if not found:
        raise DataError(
            f"{path} has no labels, they are in the devkit: put ILSVRC2012_devkit_t12.tar.gz beside it, name it with "
            "--devkit, or take the images without labels: --unlabelled"
        )
    return found[0]


def _read_devkit(devkit: str) -> tuple[list[int], dict[int, str]]:
    """(class of each validation image, WordNet id by class), classes as ILSVRC2012 numbers them from 1."""
    try:
        files = _from_folder(devkit) if is_folder(devkit) else _from_archive(devkit)
        truth = [int(line) for line in files[_TRUTH].split()]
        return truth, _wnids(files[_SYNSETS])
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{devkit} is no ImageNet devkit, which holds data/{_SYNSETS} and data/{_TRUTH}: {error}"
                        ) from None  # fmt: skip


def _from_folder(devkit: str) -> dict[str, bytes]:
    data = join(devkit, "data")
    folder = data if exists(data) else devkit
    return {name: read(join(folder, name)) for name in (_TRUTH, _SYNSETS)}


def _from_archive(devkit: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(read(devkit))) as tar:
        files = {}
        for info in tar:
            content = tar.extractfile(info) if basename(info.name) in (_TRUTH, _SYNSETS) else None
            if content is not None:
                files[basename(info.name)] = content.read()
        return files


def _wnids(mat: bytes) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError("the devkit's meta.mat is read with scipy: pip install 'ummim[imagenet]'") from None
    synsets = loadmat(io.BytesIO(mat), squeeze_me=True)["synsets"]
    return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if int(synset["num_children"]) == 0}
