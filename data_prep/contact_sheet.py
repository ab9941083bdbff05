"""A page of small pictures, each with its key and class."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIDE = 144  # of a picture, in pixels
_GAP, _LINE, _FONT = 8, 15, 12
_COLUMNS = 8
_INK, _FAINT, _ALARM = (30, 30, 30), (110, 110, 110), (180, 30, 30)


class Cell(NamedTuple):
    """A sample on the sheet; ``image`` is None, with the ``complaint``, if it cannot be decoded."""

    key: str
    caption: str
    image: Image.Image | None
    complaint: str = ""


def contact_sheet(cells: Sequence[Cell]) -> Image.Image:
    """RGB picture of ``cells``, row by row, eight a row; pictures keep their shape."""
    columns = min(len(cells), _COLUMNS)
    rows = -(-len(cells) // columns)
    width, height = SIDE + _GAP, SIDE + 2 * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT)
    for i, cell in enumerate(cells):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        if cell.image is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=_ALARM)
            for n, line in enumerate(_lines(f"cannot be decoded: {cell.complaint}", font)[:8]):
                draw.text((left + 6, top + 6 + n * _LINE), line, _ALARM, font)
        else:
            picture = cell.image
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=(240, 240, 240))
            place = (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2)
            sheet.paste(picture, place)
        draw.text((left, top + SIDE + 2), _fitted(cell.key, font), _INK, font)
        draw.text((left, top + SIDE + 2 + _LINE), _fitted(cell.caption, font), _FAINT, font)
    return sheet


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text``, or as much of its end as fits below a picture: keys differ at their ends."""
    text = text.encode("utf-8", "replace").decode()
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength("..." + text) > SIDE:
        text = text[1:]
    return "..." + text


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > SIDE - 12:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
