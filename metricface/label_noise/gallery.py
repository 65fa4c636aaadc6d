"""Sheets of images for a person to judge: findings as panels of pictures with their keys and scores."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metricface.atomic import replacing
from metricface.data.images import ImageSet, Pixels

SIDE = 120  # pixels of a picture on a sheet
CELL = 148  # and of its column
LINE = 14  # of text
GAP = 10
DPI = 100
POINTS = 7.5
CHARACTERS = 22  # of this size in a column, wide ones too
SHEET_WIDTH = 1232
SHEET_HEIGHT = 1500
PAPER, INK, QUIET = 255, "#000000", "#555555"
FRAMES = {"plain": (190, 190, 190), "question": (214, 39, 40), "first": (31, 119, 180), "second": (255, 127, 14)}

Frame = Literal["plain", "question", "first", "second"]


class Picture(NamedTuple):
    """An image of a set on a panel. frame: what it is there."""

    images: ImageSet
    image: int
    frame: Frame = "plain"


class Panel(NamedTuple):
    """A finding: a line of text over pictures."""

    title: str
    pictures: Sequence[Picture]


def write_sheets(folder: Path, name: str, panels: Sequence[Panel]) -> list[Path]:
    """Write panels to NAME_1.png, NAME_2.png, ... in `folder`, which must exist; panels flow from left to right.

    Keys are shortened in their middle to fit. Returns the files. Raises UnreadableImageError where an image cannot be
    read, OSError where a file cannot be written.
    """
    files = []
    for number, rows in enumerate(_sheets(panels), start=1):
        sheet = _draw(rows)
        encoded = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1]
        path = folder / f"{name}_{number}.png"
        with replacing(path) as file:
            file.write(encoded.tobytes())
        files.append(path)
    return files


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and end with an ellipsis between, of at most `length` characters, on one line."""
    # Bytes that are no UTF-8, line breaks and other controls have no glyphs.
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(shown) <= length:
        return shown
    tail = (length - 1) * 2 // 3  # numbers and extensions are at the end
    return f"{shown[: length - 1 - tail]}…{shown[-tail:]}"


_ROW_HEIGHT = LINE + SIDE + 2 * LINE + GAP


def _sheets(panels: Sequence[Panel]) -> list[list[list[Panel]]]:
    """Panels in rows, rows in sheets."""
    rows: list[list[Panel]] = []
    left = 0
    for panel in panels:
        width = _width(panel)
        if not rows or left + width > SHEET_WIDTH:
            rows.append([])
            left = 0
        rows[-1].append(panel)
        left += width
    many = max(1, SHEET_HEIGHT // _ROW_HEIGHT)
    return [rows[start : start + many] for start in range(0, len(rows), many)]


def _width(panel: Panel) -> int:
    return CELL * len(panel.pictures) + 2 * GAP


def _draw(rows: Sequence[Sequence[Panel]]) -> Pixels:
    width = max(sum(_width(panel) for panel in row) for row in rows)
    height = _ROW_HEIGHT * len(rows) + GAP
    sheet = np.full((height, width, 3), PAPER, dtype=np.uint8)
    texts: list[tuple[int, int, str, str]] = []  # left, top, colour, text
    for number, row in enumerate(rows):
        top, left = GAP + number * _ROW_HEIGHT, GAP
        for panel in row:
            characters = CHARACTERS * len(panel.pictures)
            texts.append((left, top, INK, shortened(panel.title, characters)))
            for place, picture in enumerate(panel.pictures):
                at = left + place * CELL
                _paste(sheet, picture, top + LINE, at)
                identity = picture.images.identities[picture.images.labels[picture.image]]
                key = picture.images.keys[picture.image].removeprefix(f"{identity}/")
                texts.append((at, top + LINE + SIDE, QUIET, shortened(identity, CHARACTERS)))
                texts.append((at, top + 2 * LINE + SIDE, QUIET, shortened(key, CHARACTERS)))
            left += _width(panel)
    return _written(sheet, texts)


def _paste(sheet: Pixels, picture: Picture, top: int, left: int) -> None:
    pixels = picture.images.read([picture.image])[0]
    scale = (SIDE - 6) / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    shown = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    shown = shown.reshape(size[1], size[0], -1)
    framed = np.empty((size[1] + 4, size[0] + 4, 3), dtype=np.uint8)
    framed[:] = FRAMES[picture.frame]
    framed[2:-2, 2:-2] = shown  # grey fills all three channels
    sheet[top : top + framed.shape[0], left : left + framed.shape[1]] = framed


def _written(sheet: Pixels, texts: Sequence[tuple[int, int, str, str]]) -> Pixels:
    """The sheet with text: by matplotlib, whose font has far more letters than OpenCV's."""
    height, width = sheet.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    figure.figimage(sheet)
    for left, top, colour, text in texts:
        figure.text(
            left / width, 1.0 - (top + 1) / height, text, color=colour, fontsize=POINTS, va="top", parse_math=False
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it draws a box in its place
        canvas.draw()  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3])  # type: ignore[no-untyped-call]
