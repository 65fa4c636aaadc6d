import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from metricface.evaluation import retrieval
from tests.vectors import case


def by_hand(embeddings: NDArray[np.float64], labels: list[int]) -> tuple[float, float, float, int]:
    """Recall@1, R-precision, MAP@R and the number of queries, one query at a time; ties go to the lower index."""
    hits, precisions, averages = [], [], []
    for query in range(len(labels)):
        others = [i for i in range(len(labels)) if i != query]
        r = sum(labels[i] == labels[query] for i in others)
        if r == 0:
            continue
        others.sort(key=lambda i: (float(((embeddings[i] - embeddings[query]) ** 2).sum()), i))
        relevant = [labels[i] == labels[query] for i in others]
        hits.append(relevant[0])
        precisions.append(sum(relevant[:r]) / r)
        averages.append(sum(sum(relevant[: i + 1]) / (i + 1) for i in range(r) if relevant[i]) / r)
    return float(np.mean(hits)), float(np.mean(precisions)), float(np.mean(averages)), len(hits)


def figures(report: retrieval.RetrievalReport) -> tuple[float, float, float, int]:
    return report.recall_at_1, report.r_precision, report.map_at_r, report.queries


def test_the_published_example() -> None:
    example = case("E6.retrieval")
    report = retrieval.evaluate(example["inputs"]["X"], example["inputs"]["labels"])
    expected = example["expected"]
    assert figures(report) == pytest.approx((expected["recall1"], expected["r_precision"], expected["map_at_r"], 8))


# Whole coordinates make distances exact, and equal distances common.
POINTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=30)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(points=POINTS)
def test_figures_are_those_of_going_through_queries_one_by_one_with_ties_by_index(
    points: list[tuple[int, int, int]],
) -> None:
    points = [*points, (1, 1, 7), (2, 1, 7)]
    embeddings = np.array([point[:2] for point in points], dtype=np.float64)
    labels = [point[2] for point in points]
    assert figures(retrieval.evaluate(embeddings, labels)) == pytest.approx(by_hand(embeddings, labels))


def test_tiles_of_any_size_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 25, 120)
    embeddings = rng.normal(size=(120, 6))
    whole = retrieval.evaluate(embeddings, labels)
    assert figures(whole) == pytest.approx(by_hand(embeddings, labels.tolist()))
    for elements in (1, 120 * 7, 120 * 119):
        monkeypatch.setattr(retrieval, "TILE_ELEMENTS", elements)
        assert figures(retrieval.evaluate(embeddings, labels)) == pytest.approx(figures(whole), abs=1e-12)


def test_figures_are_those_of_pytorch_metric_learning() -> None:
    def nearest(query: torch.Tensor, k: int, reference: torch.Tensor, _: bool) -> tuple[None, torch.Tensor]:
        dist = torch.cdist(query.double(), reference.double()).fill_diagonal_(torch.inf)
        return None, dist.argsort(dim=1)[:, :k]

    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.integers(0, 60, 200), [70, 71, 72]])
    embeddings = rng.normal(size=(80, 32))[labels] + 1.5 * rng.normal(size=(203, 32))
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=nearest,
        kmeans_func=lambda *_: None,
    )
    theirs = calculator.get_accuracy(torch.from_numpy(embeddings), torch.from_numpy(labels))
    ours = retrieval.evaluate(embeddings, labels)
    assert 0.1 < ours.map_at_r < 0.9
    assert ours.recall_at_1 == pytest.approx(theirs["precision_at_1"])
    assert ours.r_precision == pytest.approx(theirs["r_precision"])
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"])


def test_people_with_a_single_image_do_not_ask_but_can_be_found() -> None:
    report = retrieval.evaluate([[0.0], [1.0], [0.4]], [5, 5, 9])
    assert (report.queries, report.single_images, report.identities) == (2, 1, 1)
    assert report.recall_at_1 == 0.0  # the stranger at 0.4 is nearer to both


def test_labels_beyond_what_float32_tells_apart_stay_apart() -> None:
    big = 2**24
    report = retrieval.evaluate([[0.0], [1.0], [5.0], [6.0]], [big, big + 1, big, big + 1])
    assert report.recall_at_1 == 0.0
    assert report.identities == 2


def test_an_image_never_finds_itself_even_among_copies() -> None:
    report = retrieval.evaluate(np.ones((6, 4)), [0, 0, 1, 1, 2, 2])
    assert figures(report) == pytest.approx(by_hand(np.ones((6, 4)), [0, 0, 1, 1, 2, 2]))
    assert report.recall_at_1 == pytest.approx(2 / 6)  # index order alone decides


def test_a_report_names_its_figures() -> None:
    report = retrieval.evaluate([[0.0], [1.0]], [0, 0]).as_dict()
    assert report == {
        "recall_at_1": 1.0,
        "r_precision": 1.0,
        "map_at_r": 1.0,
        "queries": 2,
        "single_images": 0,
        "identities": 1,
    }


def test_what_cannot_be_measured_says_why() -> None:
    with pytest.raises(ValueError, match="each of the 3 images is the only one"):
        retrieval.evaluate(np.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="1 of 3 embeddings hold NaN"):
        retrieval.evaluate([[0.0], [np.nan], [1.0]], [0, 0, 1])
    with pytest.raises(ValueError, match=r"got \(3, 3\) and \(2,\)"):
        retrieval.evaluate(np.eye(3), [0, 1])
    with pytest.raises(ValueError, match="whole numbers"):
        retrieval.evaluate(np.eye(3), [0.5, 0.5, 1.0])
