import numpy as np
import pytest
from PIL import Image

from tests.data.pictures import encode, picture
from ummim.data.images import decode


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


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
    with pytest.raises(ValueError, match="not an image that Pillow knows"):
        decode(b"GIF? no")
    with pytest.raises(ValueError, match="not an image that Pillow knows"):
        decode(b"")
    with pytest.raises(ValueError, match="truncated"):
        decode(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="."):
        decode(encode(picture(), "PNG")[:-40])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(whole)
