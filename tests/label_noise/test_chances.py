import numpy as np
import pytest

from metricface.label_noise.chances import FalseAlarms, by_size, fit_by_second_best, fit_false_alarms, wrong_odds


def test_the_share_of_false_alarms_is_the_expected_number_over_the_found_one() -> None:
    tail = FalseAlarms(start=1.0, scale=0.5)
    scores = np.array([3.0, 0.5, 2.0, 3.0])
    expected = 0.05 * 100 * np.exp(-(scores - 1.0) / 0.5)
    found = tail.shares(scores, 100)
    assert found[0] == found[3] == pytest.approx(expected[0] / 2)
    assert found[2] == pytest.approx(expected[2] / 3)
    assert found[1] == 1.0


def test_a_higher_score_never_has_a_greater_share() -> None:
    tail = FalseAlarms(0.0, 1.0)
    scores = np.array([4.0, 3.9, 3.9, 3.9, 3.9])  # alone, the first would have the greater share
    assert tail.shares(scores, 100)[0] <= tail.shares(scores, 100)[1]


def test_outliers_stand_out_from_an_exponential_tail_and_little_else_does() -> None:
    generator = np.random.default_rng(0)
    sound = generator.exponential(size=5000)
    scores = np.concatenate([sound, np.full(100, 14.0)])
    tail = fit_false_alarms(scores)
    assert tail.scale == pytest.approx(1.0, rel=0.1)
    shares = tail.shares(scores, len(scores))
    assert (shares[5000:] < 0.01).all()
    assert (shares[:5000] <= 0.1).sum() <= 20  # 11 are to be expected


@pytest.mark.parametrize("findings", [0, 20, 180, 350])
def test_findings_do_not_hide_themselves_by_bending_the_tail(findings: int) -> None:
    scores = np.concatenate([np.random.default_rng(0).exponential(size=2000), np.full(findings, 30.0)])
    tail = fit_false_alarms(scores)
    assert tail.scale == pytest.approx(1.0, rel=0.15)
    found = tail.shares(scores, len(scores)) <= 0.1
    assert found[2000:].all()
    assert found[:2000].sum() <= 0.1 * findings + 10


def test_equal_scores_are_no_findings() -> None:
    tail = fit_false_alarms(np.ones(50))
    assert (tail.shares(np.ones(50), 50) == 1.0).all()


def test_too_few_scores_are_an_error() -> None:
    with pytest.raises(ValueError, match="19 scores are too few"):
        fit_false_alarms(np.arange(19.0))


def test_the_tail_of_the_best_is_read_from_the_second_best() -> None:
    ranked = np.sort(np.random.default_rng(0).exponential(2.0, (4000, 50)), axis=1)[:, ::-1]
    tail = fit_by_second_best(ranked[:, 1])
    assert tail.scale == pytest.approx(2.0, rel=0.05)
    for s in (14.0, 16.0):
        assert tail.expected(np.array([s]), 4000)[0] == pytest.approx((ranked[:, 0] >= s).sum(), rel=0.25)
    with pytest.raises(ValueError, match="19 scores are too few"):
        fit_by_second_best(np.arange(19.0))


def test_odds_are_those_of_the_mixture() -> None:
    generator = np.random.default_rng(0)
    wrong = generator.random(20_000) < 0.1
    scores = np.where(wrong, 4.0, 0.0) + generator.normal(size=20_000)
    odds = wrong_odds(scores, 4.0 + generator.normal(size=5000))
    assert odds.share == pytest.approx(0.1, rel=0.15)
    flips, sound = 0.1 * np.exp(-0.5 * (scores - 4.0) ** 2), 0.9 * np.exp(-0.5 * scores**2)
    assert np.abs(odds.probability - flips / (flips + sound)).mean() < 0.02
    assert odds.probability[odds.probability >= 0.5].mean() == pytest.approx(
        wrong[odds.probability >= 0.5].mean(), abs=0.06
    )
    assert odds.caught[np.argmin(np.abs(scores - 4.0))] == pytest.approx(0.5, abs=0.05)


def test_odds_never_fall_as_the_score_rises() -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=500)
    odds = wrong_odds(scores, generator.normal(size=400) + 1.0)
    assert (np.diff(odds.probability[np.argsort(scores)]) >= 0).all()


def test_where_each_wrong_item_spoils_another_the_share_is_at_most_half() -> None:
    generator = np.random.default_rng(2)
    scores, simulated = generator.normal(size=5000), generator.normal(size=5000)  # all look wrong
    assert wrong_odds(scores, simulated).share > 0.9
    spoilt = wrong_odds(scores, simulated, bystanders=generator.normal(size=5000))
    assert spoilt.share <= 0.5
    assert (spoilt.probability <= 0.75).mean() > 0.95


def test_without_scores_or_simulated_ones_nothing_is_likely() -> None:
    assert len(wrong_odds(np.empty(0), np.ones(3)).probability) == 0
    assert wrong_odds(np.ones(3), np.empty(0)).probability.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([1] * 5 + [4] * 100 + [12] * 50 + [20] * 10, [("4 to 7", 100), ("8 or more", 60)]),
        ([4] * 10 + [12] * 50 + [20] * 10, [("4 or more", 70)]),
        ([4] * 40 + [8] * 40 + [16] * 40, [("4 to 7", 40), ("8 to 15", 40), ("16 or more", 40)]),
        ([4] * 10 + [8] * 10 + [16] * 10, [("4 or more", 30)]),
        ([4] * 10, []),
        ([], []),
    ],
)
def test_groups_too_small_join_another(sizes: list[int], groups: list[tuple[str, int]]) -> None:
    found = by_size(np.array(sizes, dtype=np.int64), (4, 8, 16), 30)
    assert [(group.name, len(group.items)) for group in found] == groups
    assert [group.least for group in found] == [int(name.split()[0]) for name, _ in groups]


def test_a_group_of_one_size_is_named_by_it() -> None:
    found = by_size(np.array([1] * 30 + [2] * 30), (1, 2), 30)
    assert [(group.name, group.most) for group in found] == [("1", 1), ("2 or more", None)]
