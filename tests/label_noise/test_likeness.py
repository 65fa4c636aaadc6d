import numpy as np
import pytest
from scipy.stats import multivariate_normal

from metricface.label_noise import people as people_module
from metricface.label_noise.likeness import Likeness, fit_likeness
from metricface.label_noise.people import People
from metricface.miners.dataset import rows as rows_module
from metricface.miners.dataset.rows import UnitRows
from tests.label_noise.simulated import Labels, simulate


def test_evidence_is_the_ratio_of_the_densities_of_the_two_means_under_one_person_and_under_two() -> None:
    generator = np.random.default_rng(0)
    spread = np.array([2.0, 0.7, 0.01])
    model = Likeness(np.zeros(3), np.eye(3), spread)
    x, y = generator.normal(size=(5, 3)).astype(np.float32), generator.normal(size=(5, 3)).astype(np.float32)
    x_images, y_images = np.array([1, 1, 2, 7, 100]), np.array([1, 3, 2, 1, 50])
    found = model.evidence(x, x_images, y, y_images)
    for i in range(5):
        expected = 0.0
        for d in range(3):
            a, b = spread[d] + 1 / x_images[i], spread[d] + 1 / y_images[i]
            both = np.array([x[i, d], y[i, d]], dtype=np.float64)
            expected += float(multivariate_normal.logpdf(both, cov=np.array([[a, spread[d]], [spread[d], b]])))
            expected -= float(multivariate_normal.logpdf(both, cov=np.diag([a, b])))
        assert found[i] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_more_images_of_the_same_means_say_more() -> None:
    model = Likeness(np.zeros(2), np.eye(2), np.full(2, 3.0))
    x = np.ones((1, 2), dtype=np.float32)
    few = model.evidence(x, np.array([1]), x, np.array([1]))[0]
    many = model.evidence(x, np.array([10]), x, np.array([10]))[0]
    apart = model.evidence(x, np.array([10]), -x, np.array([10]))[0]
    assert 0 < few < many
    assert apart < -few


def test_the_fit_finds_how_much_people_differ_beside_their_images() -> None:
    made = simulate(1800, 2, dim=12, within=1.0)
    rows = UnitRows(made.embeddings.astype(np.float32))
    model = fit_likeness(rows, made.labels, np.full(1800, 2), shrinkage=0.0)
    assert len(model.spread) >= 11  # unit length takes one direction
    assert np.median(model.spread) == pytest.approx(1.0, rel=0.15)
    coordinates = model.coordinates(rows.at(slice(None)))
    apart = coordinates - np.array([coordinates[made.labels == p].mean(axis=0) for p in range(1800)])[made.labels]
    within = (apart**2).sum(axis=0) / (3600 - 1800)
    assert np.allclose(within, 1.0, atol=0.02)


def test_small_blocks_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    made = simulate(20, 5)
    order = np.random.default_rng(0).permutation(100)
    whole = People(made.embeddings[order], made.labels[order])
    monkeypatch.setattr(rows_module, "BLOCK_NUMBERS", 32 * 7)
    monkeypatch.setattr(people_module, "ROWS_PER_BLOCK", 7)
    parts = People(made.embeddings[order], made.labels[order])
    assert np.allclose(whole.model.spread, parts.model.spread)
    assert np.allclose(np.abs(whole.means), np.abs(parts.means), atol=1e-4)
    seen = [(row, images.tolist()) for row, images, _ in parts.by_identity(np.arange(20))]
    assert seen == [(row, np.flatnonzero(made.labels[order] == row).tolist()) for row in range(20)]
    assert np.concatenate([index for index, _ in parts.blocks()]).tolist() == list(range(100))


def test_the_nearest_identities_are_those_of_greatest_evidence_whatever_their_sizes() -> None:
    made = simulate(30, 6, within=1.0)
    few = np.flatnonzero((made.labels % 2 == 0) | (np.arange(180) % 6 == 0))  # every second person has one image
    people = People(made.embeddings[few], made.labels[few])
    coordinates, ones = people.coordinates(np.arange(20)), np.ones(20, dtype=np.int64)
    found = people.nearest(coordinates, ones, 3, leave_out=people.codes[:20].astype(np.int64))
    for i in range(20):
        evidence = np.array(
            [
                people.model.evidence(
                    coordinates[i : i + 1], ones[:1], people.means[c : c + 1], people.images[c : c + 1]
                )[0]
                for c in range(30)
            ]
        )
        evidence[people.codes[i]] = -np.inf
        assert found.rows[i].tolist() == np.argsort(-evidence)[:3].tolist()
        assert np.allclose(found.evidence[i], np.sort(evidence)[::-1][:3])


def test_there_may_be_fewer_identities_than_are_asked_for() -> None:
    made = simulate(2, 4)
    people = People(made.embeddings, made.labels)
    found = people.nearest(people.means, people.images, 3, leave_out=np.arange(2))
    assert found.rows.tolist() == [[1, -1, -1], [0, -1, -1]]
    assert np.isneginf(found.evidence[:, 1:]).all()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.arange(40), "all 40 identities have a single image"),
        (np.arange(39), "40 embeddings need as many labels; found 39"),
        (np.zeros(40, dtype=np.int64), "differ no more"),
    ],
)
def test_a_set_that_says_nothing_is_an_error(labels: Labels, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        People(np.random.default_rng(0).normal(size=(40, 8)), labels)


def test_a_test_set_of_another_width_is_an_error() -> None:
    made = simulate(12, 5)
    people = People(made.embeddings, made.labels)
    with pytest.raises(ValueError, match="embed both sets with one network"):
        People(made.embeddings[:, 1:], made.labels, model=people.model)
