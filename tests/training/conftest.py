import copy
from pathlib import Path

import pytest

from metricface.training.recipe import Component, Data, Recipe, Stage


def tiny_recipe() -> Recipe:
    """Two stages of a few steps on a few procedural faces: seconds, not minutes."""
    return Recipe(
        name="tiny",
        budget=None,
        data=Data(height=32, width=32, synthetic_identities=40, synthetic_images=6),
        log_every=2,
        stages=[
            Stage(
                name="softmax",
                sampler=Component("ImageBatchSampler", {"batch_size": 32}),
                head=Component("CosFace", {"scale": 16.0}),
                steps=6,
                learning_rate=0.05,
            ),
            Stage(
                name="triplet",
                sampler=Component(
                    "IdentityBalancedBatchSampler", {"identities_per_batch": 8, "images_per_identity": 3}
                ),
                miner=Component("BatchHardMiner"),
                loss=Component("TripletLoss"),
                steps=5,
                learning_rate=0.01,
            ),
        ],
    )


@pytest.fixture
def recipe() -> Recipe:
    return copy.deepcopy(tiny_recipe())


@pytest.fixture
def people_folder(tmp_path: Path) -> Path:
    """Sixteen people with four images each, as files."""
    import cv2

    from metricface.data.images import Preprocessing
    from metricface.data.synthetic import SyntheticFaces

    faces = SyntheticFaces(16, 4, Preprocessing(40, 40), seed=1)
    pixels = faces.read(range(len(faces)))
    for index, label in enumerate(faces.labels):
        folder = tmp_path / "people" / f"person_{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"person_{label:02d}_{index % 4 + 1:04d}.png"), pixels[index, :, :, ::-1])
    return tmp_path / "people"
