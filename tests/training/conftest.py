import copy
from pathlib import Path

import pytest

from metricface.training.recipe import Component, Data, Recipe, Stage
from tests.folders import write_people


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
    return write_people(tmp_path / "people", 16, 4)
