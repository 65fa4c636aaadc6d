"""Images in a folder tree: every folder that holds images is an identity."""

import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import cv2
import numpy as np

from metricface.data.images import ImageSet, Indices, Pixels, Preprocessing, SkippedFile, UnreadableImageError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm")


class FolderImages(ImageSet):
    """The images under a folder, decoded each time they are read (`in_memory()` decodes once).

    root: the identity of an image is the path of the folder that holds it, relative to root, with forward slashes;
        so `lfw/NAME/x.jpg` and deeper trees both work. Files lie in any of EXTENSIONS, upper or lower case.
    preprocessing: applied to each decoded image.

    Identities are sorted by name, images by name within them, by code point and so alike on every file system.
    Hidden files and folders (`.DS_Store`, `._x.jpg`) are passed over. Links are followed, except a link back to a
    folder that contains it. In `skipped`, with the reason: images directly in root, which name no identity; empty
    files; links that lead nowhere or round; identity-like folders without any image (as `NAME/`); files whose
    extension is another. Whether a file is a whole image is found when it is read: `read` raises, and `verified()` and
    `in_memory()` list it in the `skipped` of the set they return.

    Colour comes in RGB order, 8 bits a channel; 16 bits are scaled to 8, palettes looked up, transparency dropped; an
    EXIF orientation is applied, so that a face taken with a turned camera stands upright.

    Raises FileNotFoundError or NotADirectoryError for a wrong root, ValueError where there is no usable image.
    """

    def __init__(self, root: str | PathLike[str], preprocessing: Preprocessing) -> None:
        self.root = Path(root)
        found, skipped = _scan(self.root)
        identities = sorted(found)
        if not identities:
            raise ValueError(_nothing_found(self.root, skipped))
        labels = [label for label, name in enumerate(identities) for _ in found[name]]
        keys = [f"{name}/{file}" for name in identities for file in found[name]]
        super().__init__(identities, labels, keys, preprocessing, skipped)

    def read(self, indices: Indices) -> Pixels:
        """Decode the images at `indices`: uint8 (n, H, W, C). Raises UnreadableImageError naming the first bad file."""
        channels, height, width = self.preprocessing.shape
        pixels: Pixels = np.empty((len(indices), height, width, channels), dtype=np.uint8)
        for row, index in enumerate(indices):
            key = self.keys[index]
            pixels[row] = self.preprocessing.apply(decode_file(self.root / key, key, grey=channels == 1))
        return pixels


def decode_file(path: Path, key: str, *, grey: bool) -> Pixels:
    """Decode one file to uint8 (h, w) or (h, w, 3) RGB. Raises UnreadableImageError for `key`."""
    try:
        data = np.fromfile(path, dtype=np.uint8)  # not cv2.imread: on Windows it cannot open every Unicode name
    except OSError as error:
        raise UnreadableImageError(key, error.strerror or str(error)) from error
    if data.size == 0:
        raise UnreadableImageError(key, "the file is empty")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:  # such as a header that claims an absurd size
        raise UnreadableImageError(key, f"it cannot be decoded ({error.err})") from error
    if image is None:
        raise UnreadableImageError(key, "it is damaged, cut short, or not an image of a known format")
    return np.asarray(image, dtype=np.uint8)


def _scan(root: Path) -> tuple[dict[str, list[str]], list[SkippedFile]]:
    """Names of image files by identity, sorted, and what was left out, sorted by key."""
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root}. Give the folder that holds one folder per identity.")
    if not root.is_dir():
        raise NotADirectoryError(
            f"{root} is a file. Give the folder that holds one folder per identity; unpack an archive first."
        )
    found: dict[str, list[str]] = {}
    skipped: list[SkippedFile] = []
    for folder, identity, files, inner in _walk(root, "", (), skipped):
        images = []
        for name in files:
            key = f"{identity}/{name}" if identity else name
            reason = _why_not(folder, name, identity)
            if reason is None:
                images.append(name)
            else:
                skipped.append(SkippedFile(key, reason))
        if images:
            found[identity] = images
        elif identity and not inner:
            skipped.append(SkippedFile(f"{identity}/", "the folder holds no usable image"))
    return found, sorted(skipped)


def _walk(
    folder: Path, identity: str, above: tuple[str, ...], skipped: list[SkippedFile]
) -> Iterator[tuple[Path, str, list[str], bool]]:
    """Yield (folder, its identity, its files by name, whether it has inner folders), folder by folder."""
    real = os.path.realpath(folder)
    if real in above:
        skipped.append(SkippedFile(f"{identity}/", "the link leads back to a folder it lies in"))
        return
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        skipped.append(SkippedFile(f"{identity}/", error.strerror or str(error)))
        return
    inner = [entry.name for entry in entries if entry.is_dir()]
    yield folder, identity, [entry.name for entry in entries if not entry.is_dir()], bool(inner)
    for name in inner:
        yield from _walk(folder / name, f"{identity}/{name}" if identity else name, (*above, real), skipped)


def _why_not(folder: Path, name: str, identity: str) -> str | None:
    """Why the file is not used, or None; costs one stat."""
    extension = os.path.splitext(name)[1].lower()
    if extension not in EXTENSIONS:
        return f"the extension is not one of {' '.join(EXTENSIONS)}"
    if not identity:
        return "it lies directly in the root, so no folder names its identity"
    try:
        return "the file is empty" if (folder / name).stat().st_size == 0 else None
    except OSError as error:
        return error.strerror or str(error)


def _nothing_found(root: Path, skipped: list[SkippedFile]) -> str:
    text = f"no usable image under {root}. Wanted: one folder per identity, with {' '.join(EXTENSIONS)} files in it."
    if not skipped:
        return f"{text} The folder is empty."
    shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:3])
    return f"{text} {len(skipped):,} entries were left out: {shown}{'; ...' if len(skipped) > 3 else ''}."
