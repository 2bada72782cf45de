"""Contact sheets: rows of pictures under titled columns, one glance for a whole set."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MAX_ROWS = 24
_PAPER, _INK, _GAP_COLOUR = (255, 255, 255), (20, 20, 20), (208, 208, 208)
_GAP = 8
_TEXT_HEIGHT = 22
_FONT_SIZE = 14


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    columns: Sequence[str],
    row_labels: Sequence[str] | None = None,
    cell: int = 256,
) -> Image.Image:
    """An RGB sheet of ``rows``, each a picture or None (a grey gap) per column.

    Pictures keep their aspect inside ``cell`` x ``cell`` pixels; small ones are enlarged by whole factors without
    smoothing, so that pixels can be judged. Labels stand above their row. Of more than ``MAX_ROWS`` rows an even
    choice is shown, the first and the last among them.
    """
    shown = evenly(len(rows), MAX_ROWS)
    label_height = _TEXT_HEIGHT if row_labels else 0
    step = cell + _GAP + label_height
    width = _GAP + len(columns) * (cell + _GAP)
    sheet = Image.new("RGB", (width, _TEXT_HEIGHT + _GAP + max(1, len(shown)) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for column, title in enumerate(columns):
        _write(draw, (_GAP + column * (cell + _GAP), 4), title, cell, font)
    for line, row in enumerate(shown):
        top = _TEXT_HEIGHT + _GAP + line * step
        if row_labels:
            _write(draw, (_GAP, top), row_labels[row], width - 2 * _GAP, font)
        for column in range(len(columns)):
            left = _GAP + column * (cell + _GAP)
            image = rows[row][column] if column < len(rows[row]) else None
            if image is None:
                sheet.paste(_GAP_COLOUR, (left, top + label_height, left + cell, top + label_height + cell))
            else:
                fitted = _fitted(image, cell)
                offset = ((cell - fitted.width) // 2, (cell - fitted.height) // 2)
                sheet.paste(fitted, (left + offset[0], top + label_height + offset[1]))
    return sheet


def evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` of the positions 0 … count-1, evenly spread, both ends among them."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [0]
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    image = image.convert("RGB")
    longest = max(image.size)
    if longest <= cell:
        factor = cell // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * cell / longest)), max(1, round(image.height * cell / longest)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """One line, cut to ``width`` pixels; what the built-in font cannot draw becomes a question mark."""
    line = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(line, font=font) > width:
        while line and draw.textlength(line + "...", font=font) > width:
            line = line[: min(len(line) - 1, 200)]
        line += "..."
    draw.text(place, line, fill=_INK, font=font)
