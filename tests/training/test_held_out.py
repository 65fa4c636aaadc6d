import numpy as np
import pytest
import torch
from torch import nn

from metricface.data.images import ImageSet, MemoryImages, Preprocessing
from metricface.evaluation.pairs import PairList
from metricface.training.held_out import HeldOut, embed

CPU = torch.device("cpu")


class Tones(nn.Module):
    """Mean colour of an image as its raw embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raw = images.mean(dim=(2, 3)) + 1.0
        return raw if not self.training else self.norm(raw)


def people() -> ImageSet:
    """Three people, one red, one green, one blue, with four images of varying strength."""
    labels = np.repeat(np.arange(3), 4)
    pixels = np.zeros((12, 4, 4, 3), np.uint8)
    for index, label in enumerate(labels):
        pixels[index, :, :, label] = 100 + 30 * (index % 4)
    return MemoryImages(pixels, ("r", "g", "b"), labels, [str(i) for i in range(12)], Preprocessing(4, 4))


def test_embeddings_have_length_one_in_the_order_of_the_set_and_the_mode_is_restored() -> None:
    model = Tones().train()
    embeddings = embed(model, people(), CPU)
    assert model.training
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-6)
    assert embeddings[:4, 0].min() > 0.9


def test_embeddings_are_raw_where_that_is_asked_for() -> None:
    model = Tones()
    raw = embed(model, people(), CPU, unit=False)
    expected = [model.eval()(people().preprocessing.to_input(people()[i].images))[0].tolist() for i in range(12)]
    np.testing.assert_allclose(raw, expected, atol=1e-6)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), embed(model, people(), CPU), atol=1e-6)
    assert np.linalg.norm(raw, axis=1).std() > 0.01


def test_separable_people_are_scored_perfect_on_every_figure() -> None:
    listed = PairList(
        np.array([0, 4, 0, 1]), np.array([1, 5, 4, 8]), np.array([1, 1, 0, 0], bool), np.array([0, 1, 0, 1])
    )
    figures = HeldOut("test", people(), listed).score(Tones(), CPU).figures
    for name in ("accuracy", "auc", "recall_at_1", "map_at_r", "tar_at_far_1e-1", "listed/accuracy"):
        assert figures[name] == pytest.approx(1.0), name
    assert figures["eer"] == pytest.approx(0.0)
    assert (figures["people"], figures["images"], figures["genuine_pairs"]) == (3, 12, 18)
    assert (figures["queries"], figures["query_people"], figures["genuine_people"]) == (12, 3, 3)
    assert (figures["impostor_pairs"], figures["listed/people"], figures["listed/images"]) == (48, 3, 5)
    assert figures["tar_at_far_1e-3"] is None  # 48 impostor pairs cannot show it


def test_embeddings_that_are_not_finite_are_an_error_with_their_number() -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 3), torch.nan)

    with pytest.raises(ValueError, match="12 of 12 embeddings are not finite"):
        embed(Broken(), people(), CPU)
