"""What all tests share: one thread, and the real sets, unpacked for the run; a test skips where its set is absent."""

import os
import zipfile
from pathlib import Path

import pytest
import torch

# The tests' networks are tiny: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)

DATA = Path(os.environ.get("METRICFACE_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


def _unpacked(archive: str, folder: str, factory: pytest.TempPathFactory) -> Path:
    path = DATA / archive
    if not path.exists():
        pytest.skip(f"there is no {archive} under {DATA}; set METRICFACE_DATA to the folder that has it")
    target = factory.mktemp(folder)
    with zipfile.ZipFile(path) as content:
        content.extractall(target)
    return target / folder


@pytest.fixture(scope="session")
def orl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _unpacked("orl/orl.zip", "orl", tmp_path_factory)


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _unpacked("omniglot/omniglot_background.zip", "omniglot_background", tmp_path_factory)


@pytest.fixture(scope="session")
def lfw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _unpacked("lfw/lfw_devtrain.zip", "lfw", tmp_path_factory)


@pytest.fixture(scope="session")
def lfw_lists() -> Path:
    path = DATA / "lfw" / "lists"
    if not path.exists():
        pytest.skip(f"there are no LFW lists under {DATA}; set METRICFACE_DATA to the folder that has them")
    return path
