import os
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from metricface.data.folders import FolderImages
from metricface.data.images import Pixels, Preprocessing, UnreadableImageError

RGB = Preprocessing(8, 8)
GREY = Preprocessing(8, 8, "grey")


def write(path: Path, image: Pixels | None = None, extension: str | None = None) -> Path:
    """Write an image, BGR or grey as OpenCV takes it, whatever the name of the file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8, 3), 128, dtype=np.uint8) if image is None else image
    ok, data = cv2.imencode(extension or path.suffix.lower(), pixels)
    assert ok
    path.write_bytes(data.tobytes())
    return path


def reasons(images: FolderImages) -> dict[str, str]:
    return {skipped.key: skipped.reason for skipped in images.skipped}


def test_every_folder_with_images_is_an_identity_named_by_its_path(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a/deep/er/x.jpg", "a/y.bmp", "Ä ö/é 1.png", "C/z.PGM", "C/w.JPeG"):
        image = np.full((8, 8), 100, dtype=np.uint8) if name.endswith("PGM") else None
        write(tmp_path / name, image)
    images = FolderImages(tmp_path, RGB)
    assert images.identities == ("C", "a", "a/deep/er", "b", "Ä ö")
    assert images.keys == ("C/w.JPeG", "C/z.PGM", "a/y.bmp", "a/deep/er/x.jpg", "b/10.png", "b/2.png", "Ä ö/é 1.png")
    assert images.labels.tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert images.skipped == ()
    assert images.read(range(7)).shape == (7, 8, 8, 3)


def test_names_in_many_scripts_are_read_as_the_file_system_has_them(tmp_path: Path) -> None:
    names = ["王小明", "Łukasz", "محمد", unicodedata.normalize("NFD", "Zoë")]
    for name in names:
        write(tmp_path / name / "1.png")
    images = FolderImages(tmp_path, RGB)
    assert len(images.identities) == 4
    assert (images.read(range(4)) == 128).all()


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/1.png", "b/2.png", "a/1.png", "a/d/1.png", "a-z/1.png"):
        write(tmp_path / name)
    usual = FolderImages(tmp_path, RGB)
    assert usual.identities == ("a", "a-z", "a/d", "b")  # by the whole name, where a walk would give a, a/d, a-z
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: sorted(scandir(path), key=lambda e: e.name, reverse=True))
    assert FolderImages(tmp_path, RGB).keys == usual.keys


def test_colour_comes_out_as_red_green_blue(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 2] = 255  # OpenCV writes BGR
    write(tmp_path / "a" / "1.png", red)
    write(tmp_path / "a" / "2.bmp", red)
    assert FolderImages(tmp_path, RGB).read([0, 1])[:, 0, 0].tolist() == [[255, 0, 0]] * 2
    assert FolderImages(tmp_path, GREY).read([0])[0, 0, 0] == pytest.approx(76, abs=1)


def test_one_bit_sixteen_bit_transparent_palette_and_plain_text_images_are_read(tmp_path: Path) -> None:
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, 4:] = 255
    (tmp_path / "a").mkdir()
    data = cv2.imencode(".png", half, [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
    assert data[24] == 1  # bits a sample, in the PNG header
    (tmp_path / "a" / "1bit.png").write_bytes(data)
    write(tmp_path / "a" / "2deep.png", np.full((8, 8), 0x80FF, dtype=np.uint16))
    write(tmp_path / "a" / "3alpha.png", np.full((8, 8, 4), (10, 20, 30, 0), dtype=np.uint8))
    (tmp_path / "a" / "4palette.png").write_bytes(palette_png())
    (tmp_path / "a" / "5text.pgm").write_bytes(b"P2 8 8 255\n" + b"77 " * 64)
    images = FolderImages(tmp_path, RGB).read(range(5))
    assert images[0, 0].tolist() == [[0] * 3] * 4 + [[255] * 3] * 4
    assert (images[1] == 128).all()
    assert images[2, 0, 0].tolist() == [30, 20, 10]
    assert images[3, 0, 0].tolist() == [200, 100, 50]
    assert (images[4] == 77).all()
    assert FolderImages(tmp_path, GREY).read(range(5)).shape == (5, 8, 8, 1)


def palette_png() -> bytes:
    """8 x 8 pixels of entry 1 of a palette of two, written chunk by chunk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\1" * 8) * 8)
    colours = bytes((0, 0, 0, 200, 100, 50))
    body = chunk(b"IHDR", header) + chunk(b"PLTE", colours) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_photograph_taken_with_a_turned_camera_is_set_upright(tmp_path: Path) -> None:
    image = np.zeros((16, 16), dtype=np.uint8)
    image[:, :8] = 255
    data = cv2.imencode(".jpg", image)[1].tobytes()
    # EXIF: one entry, tag 0x0112 (orientation), value 6: turn right by a quarter to show. Left goes to the top.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(data[:2] + segment + data[2:])
    for preprocessing in (RGB, GREY):
        upright = FolderImages(tmp_path, preprocessing).read([0])[0]
        assert upright[:4].min() > 200
        assert upright[4:].max() < 50


def test_hidden_files_are_passed_over_and_what_else_is_left_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/._1.png", ".hidden/1.png", "loose.png"):
        write(tmp_path / name)
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "zero.jpg").touch()
    (tmp_path / "nobody").mkdir()
    (tmp_path / "only_empty").mkdir()
    (tmp_path / "only_empty" / "1.png").touch()
    images = FolderImages(tmp_path, RGB)
    assert images.keys == ("a/1.png",)
    found = reasons(images)
    assert list(found) == sorted(
        ["a/notes.txt", "a/zero.jpg", "loose.png", "nobody/", "only_empty/", "only_empty/1.png"]
    )
    assert "extension" in found["a/notes.txt"]
    assert found["a/zero.jpg"] == "the file is empty"
    assert "no folder names its identity" in found["loose.png"]
    assert found["nobody/"] == "the folder holds no usable image"
    assert "6 files left out" in images.describe()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_are_followed_but_not_in_circles_or_into_nothing(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    write(root / "a" / "1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "round").symlink_to(root)
    (root / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    images = FolderImages(root, RGB)
    assert images.keys == ("a/1.png", "b/1.png")
    assert "leads back" in reasons(images)["a/round/"]
    assert "a/lost.png" in reasons(images)


def test_a_wrong_root_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        FolderImages(tmp_path / "nowhere", RGB)
    file = write(tmp_path / "x.png")
    with pytest.raises(NotADirectoryError, match="is a file"):
        FolderImages(file, RGB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="The folder is empty"):
        FolderImages(tmp_path / "empty", RGB)
    with pytest.raises(ValueError, match=r"no usable image.*x\.png: it lies directly in the root"):
        FolderImages(tmp_path, RGB)


@pytest.mark.parametrize("extension", [".jpg", ".png", ".bmp", ".pgm"])
def test_damaged_files_are_named_when_read_and_listed_by_verified_and_in_memory(tmp_path: Path, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for name in ("a/1", "a/2", "b/1", "c/1"):
        path = write(tmp_path / f"{name}{extension}", noise)
        if name == "a/2":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if name == "b/1":
            path.write_bytes(b"this is no image")
    images = FolderImages(tmp_path, RGB)
    assert len(images) == 4
    with pytest.raises(UnreadableImageError, match=rf"a/2\{extension}: it is damaged"):
        images.read([0, 1, 2])
    for rest in (images.verified(), images.in_memory()):
        assert [skipped.key for skipped in rest.skipped] == [f"a/2{extension}", f"b/1{extension}"]
        assert rest.identities == ("a", "c")
        assert np.array_equal(rest.read([0, 1]), images.read([0, 3]))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "1.png")
    images = FolderImages(tmp_path, RGB)
    path.unlink()
    with pytest.raises(UnreadableImageError, match=r"a/1\.png: No such file"):
        images.read([0])


def test_one_image_a_person_is_a_set_without_genuine_pairs(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / name / "1.png")
    images = FolderImages(tmp_path, RGB)
    assert images.num_genuine_pairs == 0
    assert "3 identities with a single image" in images.describe()


def test_orl_has_forty_people_with_ten_grey_images_each(orl: Path) -> None:
    images = FolderImages(orl, Preprocessing(56, 46, "grey")).in_memory()
    assert len(images.identities) == 40
    assert images.counts().tolist() == [10] * 40
    assert images.skipped == ()
    assert images.identities[:2] == ("s1", "s10")
    assert 60 < images.read(range(400)).mean() < 160


@pytest.mark.slow
def test_omniglot_has_964_characters_with_twenty_one_bit_images_each(omniglot: Path) -> None:
    images = FolderImages(omniglot, Preprocessing(28, 28, "grey")).in_memory()
    assert images.counts().tolist() == [20] * 964
    pixels = images.read(range(len(images)))
    assert pixels.max() == 255
    assert (pixels.reshape(len(images), -1).min(axis=1) < 128).all()  # ink everywhere


@pytest.mark.slow
def test_lfw_has_4038_people_and_all_of_its_images_can_be_read(lfw: Path) -> None:
    images = FolderImages(lfw, Preprocessing(56, 56, crop=0.7))
    assert len(images.identities) == 4038
    assert len(images) == 9525
    assert int((images.counts() >= 2).sum()) == 1184
    assert images.in_memory().skipped == ()
