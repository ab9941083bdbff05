"""What is stored of an image: kept, turned, shrunk or refused."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import convert
from data_prep.convert import READER_LIMIT, Conversion, _plain_jpeg
from tests.data.pictures import encode, picture
from ummim.data.images import decode

ORIENTATION = 0x0112


def turned(kind: str = "JPEG", orientation: int = 6, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(picture(1, (48, 32)), kind, exif=exif, **options)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_rotation_is_kept_by_default(kind: str) -> None:
    stored = Conversion()(turned(kind))
    assert stored.data == turned(kind)
    assert (stored.width, stored.height) == (32, 48)  # as the loader shows it


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "png")])
def test_rotation_baked_into_the_pixels(kind: str, extension: str) -> None:
    stored = Conversion(exif="bake")(turned(kind))
    assert (stored.extension, opened(stored.data).size) == (extension, (32, 48))
    assert ORIENTATION not in opened(stored.data).getexif()
    difference = np.abs(pixels(stored.data).astype(int) - np.asarray(decode(turned(kind))).astype(int))
    assert difference.mean() < (4 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "png")])
def test_rotation_dropped_leaves_the_pixels_as_they_lie(kind: str, extension: str) -> None:
    stored = Conversion(exif="drop")(turned(kind))
    assert (stored.extension, opened(stored.data).size) == (extension, (48, 32))
    assert ORIENTATION not in opened(stored.data).getexif()
    assert np.array_equal(pixels(stored.data), pixels(turned(kind)))
    assert decode(stored.data).size == (48, 32)


def test_a_rotation_in_xmp_is_dropped_too() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(picture(1, (48, 32)), "JPEG", xmp=xmp)
    assert decode(data).size == (32, 48)
    stored = Conversion(exif="drop")(data)
    assert decode(stored.data).size == (48, 32)
    assert np.array_equal(pixels(stored.data), pixels(data))


@pytest.mark.parametrize("exif", ["bake", "drop"])
def test_upright_images_keep_their_bytes(exif: str) -> None:
    for data in (turned(orientation=1), turned(orientation=0), encode(picture()), encode(picture(), "PNG")):
        assert Conversion(exif=exif)(data).data == data  # type: ignore[arg-type]


@pytest.mark.parametrize(("exif", "size"), [("keep", (20, 30)), ("bake", (20, 30)), ("drop", (30, 20))])
def test_what_is_shrunk_has_its_rotation_applied_or_dropped(exif: str, size: tuple[int, int]) -> None:
    stored = Conversion(short_side=20, exif=exif)(turned())  # type: ignore[arg-type]
    assert opened(stored.data).size == size
    assert (stored.width, stored.height) == size
    assert ORIENTATION not in opened(stored.data).getexif()


def test_an_image_that_the_loader_would_refuse_is_shrunk_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow, and so the loader, refuses twice as many
    monkeypatch.setattr(convert, "READER_LIMIT", 1000)
    data = encode(picture(size=(40, 30)), "PNG")
    with pytest.raises(ValueError, match="40x30 pixels are more than 1000"):
        Conversion(max_pixels=1000)(data)
    with pytest.raises(ValueError, match="40x30 pixels as stored, but the loader reads up to 1000"):
        Conversion(max_pixels=1200)(data)
    assert Conversion(max_pixels=1200, short_side=20)(data).width == 27
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(data)  # the limit is Pillow's again


@pytest.mark.parametrize("mode", ["RGB", "L", "progressive", "4:4:4", "optimized"])
def test_plain_jpegs_are_checked_without_pillow(mode: str) -> None:
    options: dict[str, dict] = {
        "progressive": {"progressive": True},
        "4:4:4": {"subsampling": 0},
        "optimized": {"optimize": True},
    }
    image = picture(3, (50, 35))
    data = encode(image.convert("L") if mode == "L" else image, **options.get(mode, {}))
    plain = _plain_jpeg(data, READER_LIMIT)
    assert plain == (50, 35, "JPEG L" if mode == "L" else "JPEG RGB")


def test_what_the_quick_check_passes_pillow_decodes() -> None:
    rng = random.Random(0)
    originals = [encode(picture(i, (64, 48)), quality=80 + i, progressive=bool(i % 2)) for i in range(4)] + [turned()]
    passed = failed = 0
    for _ in range(1500):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(2, len(data)) :]
        if _plain_jpeg(bytes(data), READER_LIMIT) is None:
            failed += 1
            continue
        passed += 1
        assert decode(bytes(data)).mode == "RGB"
    assert passed > 100
    assert failed > 100


def test_every_truncation_is_found() -> None:
    data = encode(picture(2, (64, 48)))
    for end in range(3, len(data) - 2, 7):
        with pytest.raises(ValueError, match=r"truncated|not an image|broken|.+"):
            Conversion()(data[:end])


def test_formats_that_are_read_by_other_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="not an image of a format that is read"):
        Conversion()(encode(picture(), "EPS"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"])
def test_damage_of_any_kind_is_a_reason_and_no_crash(kind: str) -> None:
    rng, original = random.Random(kind), encode(picture(4, (32, 24)), kind)
    for _ in range(200):
        data = bytearray(original)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert Conversion()(bytes(data)).width > 0
        except ValueError as error:
            assert str(error)


def test_no_file_is_no_picture(tmp_path: Path) -> None:
    for data in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\0" * 100):
        with pytest.raises(ValueError, match=r".+"):
            Conversion()(data)
