import random
import sysconfig
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from tests.data.pictures import encode, picture
from ummim.data import Augment, DataConfig, images, turbojpeg
from ummim.data.images import Pixels, decode
from ummim.data.turbojpeg import VARIABLE, TurboJpeg

SUBSAMPLINGS = ("444", "422", "420", "440", "411", "gray")


@pytest.fixture(scope="module")
def library() -> TurboJpeg:
    """That of the package turbojpeg, for tests alone: it was made of a beta version."""
    found = sorted(Path(sysconfig.get_paths()["platlib"]).glob("turbojpeg.libs/libturbojpeg-*.so*"))
    if not found:
        pytest.skip("pip install turbojpeg")
    return TurboJpeg(str(found[0]))


def use(library: TurboJpeg | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "turbojpeg", lambda: library)


def noisy(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-60, 60, (size[1], size[0], 3))
    return (np.asarray(picture(seed, size)).astype(int) + noise).clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, subsampling: str) -> bytes:
    if subsampling == "gray":
        return encode(Image.fromarray(pixels).convert("L"), quality=90)
    return simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling=subsampling)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(77, 51), (64, 48), (33, 100), (5, 3), (1, 1)])
def test_parts_have_the_whole_pictures_pixels(library: TurboJpeg, subsampling: str, size: tuple[int, int]) -> None:
    data = jpeg(noisy(size), subsampling)
    whole, rng, compared = simplejpeg.decode_jpeg(data), random.Random(0), 0
    edges = [sorted({0, 1, side // 2, side - 1, side, *(rng.randint(0, side) for _ in range(4))}) for side in size]
    spans = [[(a, b) for a in each for b in each if a < b] for each in edges]
    for (left, right), (top, bottom) in product(*spans):
        part = library.part(data, left, top, right - left, bottom - top)
        assert part is not None
        assert np.array_equal(part, whole[top:bottom, left:right])
        compared += 1
    assert compared == len(spans[0]) * len(spans[1]) > 0


@pytest.mark.parametrize("options", [{"restart_marker_blocks": 3}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_restart_markers_and_other_tables_change_nothing(library: TurboJpeg, options: dict) -> None:
    data = encode(Image.fromarray(noisy((90, 70))), quality=80, **options)
    part = library.part(data, 37, 21, 40, 33)
    assert part is not None
    assert np.array_equal(part, simplejpeg.decode_jpeg(data)[21:54, 37:77])


def test_what_is_no_whole_sequential_jpeg_or_lies_outside_is_left_to_others(library: TurboJpeg) -> None:
    data = jpeg(noisy((90, 70)), "420")
    assert library.part(data, 0, 0, 90, 70) is not None
    for box in ((-1, 0, 9, 9), (0, -1, 9, 9), (82, 0, 9, 9), (0, 62, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0), (0, 0, 91, 70)):
        assert library.part(data, *box) is None
    others = {
        "cut": data[:-2],
        "with more behind it": data + b"\0",
        "progressive": encode(picture(size=(90, 70)), progressive=True),
        "CMYK": encode(picture(size=(90, 70)).convert("CMYK")),
        "no JPEG": encode(picture(size=(90, 70)), "PNG") + b"\xff\xd9",
        "nothing": b"",
        "an end": b"\xff\xd9",
        "a start": b"\xff\xd8\xff\xd9",
    }
    assert {name: library.part(file, 8, 8, 16, 16) for name, file in others.items()} == dict.fromkeys(others)


def part_of(data: bytes, box: tuple[int, int, int, int]) -> np.ndarray | str | None:
    """A part's pixels, or what is wrong; None if the header tells a size that the part does not fit in."""
    try:
        found = Pixels(data)
        fits = box[0] + box[2] <= found.width and box[1] + box[3] <= found.height
        return found.part(*box) if fits else None
    except ValueError as error:
        return str(error)


def test_broken_files_are_the_same_with_and_without_it(library: TurboJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, cut and ended, overwritten: the same error, or the same pixels. Only damage below a part is not seen."""
    rng, pixels, unseen, errors, equal = random.Random(0), noisy((90, 70)), 0, 0, 0
    for i in range(1200):
        whole = jpeg(pixels, SUBSAMPLINGS[i % 4]) if i < 1100 else encode(picture(size=(90, 70)), progressive=True)
        at = rng.randrange(2, min(len(whole) - 2, (700, len(whole))[i % 2]))
        cut, overwritten = whole[:at], whole[:at] + rng.randbytes(3) + whole[at + 3 :]
        data = (cut, cut + b"\xff\xd9", overwritten, overwritten)[i // 2 % 4]
        w, h = rng.randint(1, 60), rng.randint(1, 50)
        box = rng.randint(0, 90 - w), rng.randint(0, 70 - h), w, h
        use(library, monkeypatch)
        found = part_of(data, box)
        use(None, monkeypatch)
        expected = part_of(data, box)
        if isinstance(expected, str) and not isinstance(found, str):
            unseen += 1
            assert expected == "broken data stream when reading image file"
            continue
        assert np.array_equal(found, expected)  # type: ignore[arg-type]
        errors += isinstance(found, str)
        equal += isinstance(found, np.ndarray)
    assert errors > 200
    assert equal > 400
    assert unseen < 30


def test_views_are_the_same_with_and_without_it(library: TurboJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    data, augment = jpeg(noisy((130, 90)), "420"), Augment(DataConfig("", image_size=32))
    use(library, monkeypatch)
    with monkeypatch.context() as whole:
        whole.setattr(simplejpeg, "decode_jpeg", lambda data: pytest.fail("the whole picture was decoded"))
        found = [augment.located_view(data, seed) for seed in range(8)]
    use(None, monkeypatch)
    for seed, (view, box) in enumerate(found):
        plain, place = augment.located_view(data, seed)
        assert torch.equal(view, plain)
        assert box == place == augment.located(decode(data), seed)[1]


def test_the_library_is_used_only_where_it_serves(library: TurboJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    find, file = turbojpeg.turbojpeg.__wrapped__, library._functions._name
    monkeypatch.setenv(VARIABLE, file)
    assert isinstance(find(), TurboJpeg)
    for other in ("", "/nowhere/libturbojpeg.so.0", "libm.so.6"):  # none, none there, one without the functions
        monkeypatch.setenv(VARIABLE, other)
        assert find() is None
    monkeypatch.setenv(VARIABLE, file)
    monkeypatch.setattr(TurboJpeg, "part", lambda self, data, left, top, w, h: np.zeros((h, w, 3), np.uint8))
    assert find() is None  # other pixels


def test_a_picture_of_another_size_than_its_header_tells_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(size=(48, 40)))
    monkeypatch.setattr(images, "_plain_jpeg_size", lambda data: (4000, 48))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data: (_ for _ in ()).throw(ValueError))
    use(None, monkeypatch)
    with pytest.raises(ValueError, match="two sizes"):
        Pixels(data).part(0, 3000, 48, 900)
