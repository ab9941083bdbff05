import subprocess
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from tests.data.pictures import encode, picture
from ummim.data import images
from ummim.data.images import Pixels, decode, open_image


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def decode_pixels(data: bytes) -> np.ndarray:
    return Pixels(data).whole()


def test_rgb_stays_as_it_is() -> None:
    assert np.array_equal(pixels(encode(picture(), "PNG")), np.asarray(picture()))


def test_grey_and_palette_become_rgb() -> None:
    grey = picture().convert("L")
    assert np.array_equal(pixels(encode(grey, "PNG")), np.asarray(grey)[..., None].repeat(3, axis=2))
    palette = picture().quantize(16)
    assert np.array_equal(pixels(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_transparent_pixels_are_white() -> None:
    image = picture().convert("RGBA")
    alpha = np.full((40, 48), 255, np.uint8)
    alpha[:20], alpha[20:30] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    expected = np.asarray(picture()).astype(int)
    found = pixels(encode(image, "PNG")).astype(int)
    assert (found[:20] == 255).all()
    assert abs(found[20:30] - (expected[20:30] + 255) / 2).max() <= 2
    assert np.array_equal(found[30:], expected[30:])


def test_transparency_of_grey_and_palette_images_is_white_too() -> None:
    grey = picture().convert("LA")
    grey.putalpha(0)
    assert (pixels(encode(grey, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 1), 1)
    found = pixels(encode(palette, "PNG", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 255, 0]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(kind: type) -> None:
    values: np.ndarray = np.linspace(0, 1 if kind is np.float32 else 255, 48 * 40).reshape(40, 48).astype(kind)
    with pytest.raises(ValueError, match="32 bits have no known range: convert them to 8 bits"):
        decode(encode(Image.fromarray(values), "TIFF"))


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    values = (np.arange(48 * 40, dtype=np.uint16) * 34).reshape(40, 48)
    found = pixels(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(found[..., 0], values // 256)


def test_cmyk_becomes_rgb() -> None:
    found = pixels(encode(picture().convert("CMYK"), "JPEG", quality=95))
    assert abs(found.astype(int) - np.asarray(picture()).astype(int)).mean() < 8


@pytest.mark.parametrize(("orientation", "turned"), [(1, (48, 40)), (3, (48, 40)), (6, (40, 48)), (8, (40, 48))])
def test_exif_orientation_is_applied(orientation: int, turned: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), "PNG", exif=exif)
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    assert decode(data).size == turned
    assert np.array_equal(pixels(data), np.rot90(np.asarray(picture()), turns))


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [picture(i) for i in range(3)]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels(data), np.asarray(frames[0]))


def test_unreadable_bytes_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(picture(size=(300, 300)))
    with pytest.raises(ValueError, match="not an image of a format that is read"):
        decode(b"GIF? no")
    with pytest.raises(ValueError, match="not an image of a format that is read"):
        decode(b"")
    with pytest.raises(ValueError, match="truncated"):
        decode(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="."):
        decode(encode(picture(), "PNG")[:-40])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(whole)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "ICO", "TGA", "SGI", "DDS", "IM"])
def test_formats_that_are_not_stated_are_never_tried(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of a foreign shard may be anything, whatever its name; EPS would run Ghostscript."""
    Image.init()  # as if another library had loaded all of Pillow's readers
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was run"))
    data = encode(picture(), kind)
    for read in (decode, decode_pixels, open_image):
        with pytest.raises((ValueError, UnidentifiedImageError)):
            read(data)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_stated_formats_are_read(kind: str) -> None:
    assert decode(encode(picture(), kind)).size == picture().size


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def xmp(orientation: int) -> bytes:
    """A JPEG whose rotation stands in XMP alone, as some programs write it."""
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return encode(picture(), xmp=packet.encode())


PLAIN = {
    "4:2:0": encode(picture(size=(123, 77)), quality=90, subsampling="4:2:0"),
    "4:2:2": encode(picture(size=(123, 77)), quality=90, subsampling="4:2:2"),
    "4:4:4": encode(picture(size=(123, 77)), quality=90, subsampling="4:4:4"),
    "progressive": encode(picture(size=(123, 77)), quality=90, progressive=True),
    "one pixel": encode(picture(size=(1, 1))),
    "grey": encode(picture(size=(123, 77)).convert("L")),
    "comment and profile": encode(picture(), comment=b"\xff\xda\xff\xe1", icc_profile=b"\xff\xe1" * 70000),
    "EXIF, upright": encode(picture(), exif=rotated(1)),
    "XMP, upright": xmp(1),
    "bytes after the end": encode(picture()) + b"\0" * 100,
}
OTHERS = {
    "CMYK": encode(picture().convert("CMYK")),
    "RGB in a JPEG": encode(picture(), keep_rgb=True),
    "PNG": encode(picture().convert("RGBA"), "PNG"),
    "EXIF, turned": encode(picture(), exif=rotated(6)),
    "EXIF, mirrored": encode(picture(), exif=rotated(2)),
    "XMP, turned": xmp(8),
}


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_the_array_has_the_images_pixels(name: str) -> None:
    data = (PLAIN | OTHERS)[name]
    found = decode_pixels(data)
    assert found.flags.writeable
    assert np.array_equal(found, pixels(data))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_do_not_wait_for_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "decode", lambda data: pytest.fail("decoded by Pillow"))
    decode_pixels(PLAIN[name])


def outcome(data: bytes, function: Callable[[bytes], object]) -> np.ndarray | str:
    try:
        return np.asarray(function(data))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("progressive", [False, True])
def test_of_broken_jpegs_both_say_the_same(progressive: bool) -> None:
    """Cut anywhere, or with a few bytes overwritten anywhere: an error, or the same pixels."""
    whole = encode(picture(2, (90, 70)), quality=80, progressive=progressive, exif=rotated(1))
    rng, faults = np.random.default_rng(0), 0
    broken = [whole[:cut] for cut in range(0, len(whole), 7)]
    for at in range(2, len(whole) - 4, 9):
        broken.append(whole[:at] + rng.bytes(3) + whole[at + 3 :])
    for data in broken:
        expected, found = outcome(data, decode), outcome(data, decode_pixels)
        assert np.array_equal(expected, found)
        faults += isinstance(found, str)
    assert faults > len(broken) / 2
    assert faults >= len(range(0, len(whole) - 9, 7))  # whatever is cut, it is seen


def test_arrays_of_unreadable_bytes_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(picture(size=(300, 300)))
    for cut in (3, 100, len(whole) // 2, len(whole) - 40):
        with pytest.raises(ValueError, match="(?i)truncated|not an image"):
            decode_pixels(whole[:cut])
    for data in (b"", b"\xff\xd8", b"GIF? no", b"\xff\xd8" + b"\xff" * 50, b"\xff\xd8\xff\xe1\0\0" * 9):
        with pytest.raises(ValueError, match="not an image of a format that is read"):
            decode_pixels(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        decode_pixels(whole)
