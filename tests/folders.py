"""Folders of people for tests that read files."""

from pathlib import Path

import cv2

from metricface.data.images import Preprocessing
from metricface.data.synthetic import SyntheticFaces


def write_people(folder: Path, people: int, images: int, *, first: int = 0) -> Path:
    """A folder of people in LFW's layout."""
    faces = SyntheticFaces(people, images, Preprocessing(40, 40), first_identity=first)
    pixels = faces.read(range(len(faces)))
    for index, label in enumerate(faces.labels):
        name = f"Person_{first + label:02d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name / f"{name}_{index % images + 1:04d}.png"), pixels[index, :, :, ::-1])
    return folder
