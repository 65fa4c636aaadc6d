"""Batches of neighbourhoods: who stands in them, who is still seen, and tables that change while training goes on."""

import copy
import pickle
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from samplers import LookAlikeBatchSampler
from samplers.look_alikes import PLANNED_AHEAD
from tests.samplers.test_identity_balanced import check_batch, labels_with


class IdentityRows(NamedTuple):
    rows: Any
    cos: Any


def circle(identities: int, k: int = 4) -> Any:
    """Everybody looks like the next k, which stand behind in the order of labels."""
    return (np.arange(identities)[:, None] + 1 + np.arange(k)) % identities


def rows_of(batch: list[int], labels: list[int], k: int) -> list[int]:
    return [(labels[image] + 3) // 7 for image in batch[::k]]  # labels_with names row r 7 r - 3


def drawn_from(batch: list[int], table: Any, neighbourhoods: list[tuple[int, int]]) -> None:
    """Each neighbourhood (centre slot, look-alikes) as full as its row allows, given all that stands in the batch."""
    for centre, size in neighbourhoods:
        behind = batch[centre + 1 : centre + 1 + size]
        row = set(table[batch[centre]].tolist()) - {-1}
        strangers = [one for one in behind if one not in row]
        if strangers:  # then nobody was left in the row
            assert row <= set(batch)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    p = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(1, 6), min_size=p, max_size=30))
    identities, k = len(counts), draw(st.integers(1, 6))
    neighbourhood = draw(st.integers(2, 5))
    shares = [share for share in (0.0, 0.3, 0.5, 0.75) if _fits(p, share, neighbourhood)]
    return {
        "counts": counts,
        "p": p,
        "k": draw(st.integers(1, 4)),
        "table": np.random.default_rng(draw(st.integers(0, 99))).integers(-1, identities, (identities, k)),
        "share": draw(st.sampled_from(shares)),
        "neighbourhood": neighbourhood,
        "seed": draw(st.integers(0, 5)),
    }


def _fits(p: int, share: float, neighbourhood: int) -> bool:
    look_alikes = round(share * p)
    some = look_alikes > 0 or share == 0.0
    return some and p > look_alikes and -(-look_alikes // (neighbourhood - 1)) <= p - look_alikes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_batches_are_distinct_identities_and_everybody_has_a_visit_that_is_nobodys_look_alike(
    case: dict[str, Any],
) -> None:
    labels, p, k = labels_with(case["counts"]), case["p"], case["k"]
    sampler = LookAlikeBatchSampler(
        labels,
        p,
        k,
        case["table"],
        look_alike_share=case["share"],
        neighbourhood=case["neighbourhood"],
        seed=case["seed"],
    )
    look_alikes = round(case["share"] * p)
    mains = p - look_alikes
    assert len(sampler) == -(-len(case["counts"]) // mains)
    layout = sampler._layout
    assert layout.sizes.sum() == look_alikes
    assert all(size <= case["neighbourhood"] - 1 for size in layout.sizes)
    hoods = list(zip(layout.centres.tolist(), layout.sizes.tolist(), strict=True))
    behind = {slot for centre, size in hoods for slot in range(centre + 1, centre + 1 + size)}
    assert len(behind) == look_alikes
    assert behind <= set(range(p))
    for _ in range(2):
        visited: list[int] = []
        for batch in sampler:
            check_batch(batch, labels, p, k)
            rows = rows_of(batch, labels, k)
            visited += [row for slot, row in enumerate(rows) if slot not in behind]
            drawn_from(rows, case["table"], hoods)
        assert Counter(visited[: len(case["counts"])]) == Counter(range(len(case["counts"])))
    assert sampler.planned_look_alikes == 2 * len(sampler) * look_alikes


def test_look_alikes_stand_behind_their_centre_and_are_drawn_evenly_from_its_row() -> None:
    labels = labels_with([3] * 60)
    sampler = LookAlikeBatchSampler(labels, 8, 2, circle(60, 5), look_alike_share=0.5, neighbourhood=3)
    assert len(sampler) == 15
    steps: Counter[int] = Counter()
    for _ in range(40):
        for batch in sampler:
            rows = rows_of(batch, labels, 2)
            for centre in (0, 4):  # two neighbourhoods of three, each followed by one stranger
                for row in rows[centre + 1 : centre + 3]:
                    steps[(row - rows[centre]) % 60] += 1
    assert sampler.missing_look_alikes / sampler.planned_look_alikes < 0.01  # two neighbourhoods that overlap
    assert sum(steps[step] for step in range(1, 6)) >= 0.99 * 40 * 15 * 4
    assert max(abs(steps[step] - 480) for step in range(1, 6)) < 5 * 480**0.5


def test_missing_look_alikes_are_counted_and_strangers_take_their_places() -> None:
    labels = labels_with([3] * 20)
    nobody = np.full((20, 1), -1)
    sampler = LookAlikeBatchSampler(labels, 6, 2, nobody, look_alike_share=0.5)
    for batch in sampler:
        check_batch(batch, labels, 6, 2)
    assert sampler.missing_look_alikes == sampler.planned_look_alikes == 3 * len(sampler)
    themselves = LookAlikeBatchSampler(labels, 6, 2, np.arange(20)[:, None], look_alike_share=0.5)
    list(themselves)
    assert themselves.missing_look_alikes == themselves.planned_look_alikes


def test_identities_without_visits_are_nobodys_look_alikes() -> None:
    labels = labels_with([5, 5, 5, 5, 1, 2, 1, 1])
    sampler = LookAlikeBatchSampler(
        labels, 2, 2, circle(8, 7), look_alike_share=0.5, neighbourhood=2, min_images=3, singletons_per_batch=3
    )
    for _ in range(4):
        for batch in sampler:
            assert set(check_batch(batch[:4], labels, 2, 2)) <= {-3, 4, 11, 18}
            assert len(set(batch[4:])) == 3


def test_without_look_alikes_everybody_meets_strangers_as_in_balanced_batches() -> None:
    labels = labels_with([3] * 20)
    sampler = LookAlikeBatchSampler(labels, 5, 2, circle(20), look_alike_share=0.0)
    assert len(sampler) == 4
    assert sorted(row for batch in sampler for row in rows_of(batch, labels, 2)) == list(range(20))


class Numbers(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


def strides(batches: Any, labels: list[int]) -> list[int]:
    """By how much each batch's one look-alike is ahead of its centre."""
    rows = [rows_of(list(batch), labels, 1) for batch in batches]
    return [(row[1] - row[0]) % 200 for row in rows]


def striding(step: int) -> Any:
    return ((np.arange(200) + step) % 200)[:, None]


def make(**options: Any) -> tuple[LookAlikeBatchSampler, list[int]]:
    labels = labels_with([1] * 200)
    return LookAlikeBatchSampler(labels, 2, 1, striding(1), neighbourhood=2, **options), labels


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_table_is_in_force_from_its_batch_on_however_much_is_fetched_ahead(workers: int | None) -> None:
    sampler, labels = make()
    loader: Any = sampler
    if workers is not None:
        loader = DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers)
    found = []
    for step, batch in enumerate(loader):
        found.append(strides([batch], labels)[0])
        if step == 10:
            sampler.refresh(striding(7), at=60)
        if step == 100:
            sampler.refresh(torch.from_numpy(striding(9)), at=150)
    assert found == [1] * 60 + [7] * 90 + [9] * 50


def test_a_table_that_is_still_computed_is_waited_for() -> None:
    sampler, labels = make()
    coming: Future[Any] = Future()
    iterator = iter(sampler)
    batches = [next(iterator)]
    sampler.refresh(coming, at=PLANNED_AHEAD + 3)
    batches += [next(iterator) for _ in range(PLANNED_AHEAD - 1)]
    threading.Timer(0.2, lambda: coming.set_result(striding(5))).start()
    batches += list(iterator)
    assert strides(batches, labels) == [1] * (PLANNED_AHEAD + 3) + [5] * (200 - PLANNED_AHEAD - 3)


def test_a_table_is_waited_for_at_its_own_batch_and_not_before() -> None:
    sampler, labels = make()
    coming: Future[Any] = Future()
    sampler.refresh(coming, at=PLANNED_AHEAD + 5)
    iterator = iter(sampler)
    batches = [next(iterator) for _ in range(PLANNED_AHEAD + 5)]
    coming.set_result(striding(5))
    batches.append(next(iterator))
    assert strides(batches, labels) == [1] * (PLANNED_AHEAD + 5) + [5]


def test_what_went_wrong_in_the_background_is_raised_where_the_table_is_needed() -> None:
    sampler, _ = make()
    broken: Future[Any] = Future()
    broken.set_exception(RuntimeError("embeddings are not finite"))
    sampler.refresh(broken, at=40)
    with pytest.raises(RuntimeError, match="not finite"):
        list(sampler)
    assert [kept["at"] for kept in sampler.state_dict()["neighbours"]] == [0]  # a state does not need what failed
    copy.deepcopy(sampler)
    sampler.refresh(striding(2), at=40)  # and another table takes its place
    labels = labels_with([1] * 200)
    assert strides(sampler, labels) == [1] * 40 + [2] * 160
    wrong: Future[Any] = Future()
    wrong.set_result(np.zeros((3, 1), dtype=int))
    sampler, _ = make()
    sampler.refresh(wrong, at=40)
    with pytest.raises(ValueError, match=r"shape \(200, k\)"):
        list(sampler)


@pytest.mark.parametrize("stop", [5, 50, 59, 60, 61, 120, 199, 230])
def test_a_state_brings_the_tables_it_needs_those_that_are_not_in_force_yet_included(stop: int) -> None:
    def run(sampler: LookAlikeBatchSampler, number: int, wanted: int) -> list[list[int]]:
        """The loop of a trainer that asks for tables at steps of its own."""
        batches: list[list[int]] = []
        while len(batches) < wanted:
            for batch in sampler:
                batches.append(batch)
                if number + len(batches) == 4:
                    sampler.refresh(striding(7), at=60)
                if number + len(batches) == 130:
                    sampler.refresh(striding(9), at=220)
                if len(batches) == wanted:
                    break
        return batches

    straight, _ = make()
    plan = run(straight, 0, 300)
    sampler, _ = make()
    seen = run(sampler, 0, stop)
    state = pickle.loads(pickle.dumps(sampler.state_dict()))  # as a checkpoint does
    resumed, _ = make()
    resumed.load_state_dict(state)
    assert resumed.table_from() == sampler.table_from()
    assert seen + run(resumed, stop, 300 - stop) == plan


def test_a_state_keeps_the_table_where_some_identities_have_no_visits() -> None:
    labels = labels_with([1, 4, 4, 1, 4, 4, 4])

    def made(table: Any) -> LookAlikeBatchSampler:
        return LookAlikeBatchSampler(labels, 2, 2, table, neighbourhood=2, min_images=2)

    sampler, other = made(circle(7)), made(np.full((7, 1), -1))
    other.load_state_dict(sampler.state_dict())
    assert [list(other) for _ in range(3)] == [list(sampler) for _ in range(3)]
    assert other.missing_look_alikes == sampler.missing_look_alikes < other.planned_look_alikes


def test_an_epoch_left_early_starts_again_with_the_tables_it_had() -> None:
    sampler, labels = make()
    for step, _ in enumerate(sampler):
        if step == 2:
            sampler.refresh(striding(7), at=60)
        if step == 90:
            break
    sampler.refresh(striding(9), at=150)
    assert strides(sampler, labels) == [1] * 60 + [7] * 90 + [9] * 50


def test_tables_that_no_epoch_under_way_needs_are_let_go() -> None:
    sampler, _ = make()
    for number in range(5):
        list(sampler)
        sampler.refresh(striding(number), at=(number + 1) * 200 + 50)
    assert len(sampler._tables) == 2
    assert sampler.table_from() == 4 * 200 + 50


def test_a_copy_waits_for_tables_and_goes_on_from_there() -> None:
    sampler, labels = make()
    coming: Future[Any] = Future()
    coming.set_result(striding(3))
    sampler.refresh(coming, at=40)
    assert strides(copy.deepcopy(sampler), labels) == [1] * 40 + [3] * 160


def test_a_table_for_batches_that_are_planned_already_is_refused() -> None:
    sampler, _ = make()
    next(iter(sampler))
    with pytest.raises(ValueError, match=f"at batch 10: batches up to {PLANNED_AHEAD - 1} are planned"):
        sampler.refresh(striding(2), at=10)
    sampler.refresh(striding(2), at=PLANNED_AHEAD)
    sampler.refresh(striding(3), at=PLANNED_AHEAD + 1)
    with pytest.raises(ValueError, match=f"a table from batch {PLANNED_AHEAD + 1} on"):
        sampler.refresh(striding(2), at=PLANNED_AHEAD)
    with pytest.raises(ValueError, match="at must be at least 0"):
        sampler.refresh(striding(2), at=-1)


def test_a_table_before_the_position_that_was_loaded_is_refused() -> None:
    sampler, _ = make()
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 5, "position": 3})
    with pytest.raises(ValueError, match="batches up to 1002 are planned"):
        sampler.refresh(striding(2), at=1002)
    sampler.refresh(striding(2), at=1003)


def test_a_table_for_the_same_batch_replaces_the_one_before_it() -> None:
    sampler, labels = make()
    sampler.refresh(striding(4), at=0)
    sampler.refresh(striding(6), at=50)
    sampler.refresh(striding(7), at=50)
    assert strides(sampler, labels) == [4] * 50 + [7] * 150


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"look_alike_share": 1.0}, r"look_alike_share=1.0 .* \[0, 1\)"),
        ({"look_alike_share": -0.1}, "look_alike_share=-0.1"),
        ({"look_alike_share": 0.97}, "8 look-alikes in a batch of 8 .* leave 0 .* Lower look_alike_share"),
        ({"look_alike_share": 0.75, "neighbourhood": 3}, "leave 2 .* need 3. Make neighbourhood at least 4, or lower"),
        ({"look_alike_share": 0.05}, "look_alike_share=0.05 of 8 rounds to 0"),
        ({"neighbours": [[1, 2], [3]]}, r"shape \(20, k\).* found float64 of shape \(0,\)"),
        ({"neighbours": IdentityRows(circle(20), circle(20) * 0.5)}, "pass the `rows` of what found it"),
        ({"neighbourhood": 1}, "neighbourhood must be at least 2"),
        ({"neighbours": np.zeros((20, 0), dtype=int)}, r"shape \(20, k\).* found int64 of shape \(20, 0\)"),
        ({"neighbours": np.zeros((19, 2), dtype=int)}, r"found int64 of shape \(19, 2\)"),
        ({"neighbours": np.zeros((20, 2))}, "found float64"),
        ({"neighbours": np.full((20, 2), 20)}, "identities 0 to 19, or -1 for none; found 20 to 20"),
        ({"neighbours": np.full((20, 2), -2)}, "found -2 to -2"),
        ({"world_size": 3}, "identities_per_batch=8 .* world_size=3"),
        ({"min_images": 5}, "LookAlikeBatchSampler needs 8 identities with at least 5 images"),
    ],
)
def test_wrong_arguments_say_what_was_asked_what_was_found_and_what_to_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LookAlikeBatchSampler(labels_with([3] * 20), 8, 2, **{"neighbours": circle(20), **options})


def test_a_state_of_another_sampler_is_refused() -> None:
    sampler, _ = make()
    state = sampler.state_dict()
    other_state = {**state, "epoch": 7}
    del state["neighbours"]
    with pytest.raises(ValueError, match="no tables of neighbours"):
        sampler.load_state_dict(state)
    for wrong in ([], None, [{"x": 1}], [3], [{"at": 5, "table": striding(1)}, {"at": 0, "table": striding(1)}]):
        with pytest.raises(ValueError, match="should list tables"):
            sampler.load_state_dict({**other_state, "neighbours": wrong})
    assert sampler.state_dict()["epoch"] == 0
    other, _ = make(look_alike_share=0.0)
    with pytest.raises(ValueError, match="look_alikes_per_batch was 0 and is 1"):
        sampler.load_state_dict(other.state_dict())


def test_the_plan_is_pinned_so_that_saved_positions_keep_their_meaning() -> None:
    labels = [0, 0, 0, 1, 1, 2, 3, 3, 4, 5]
    sampler = LookAlikeBatchSampler(labels, 4, 2, circle(6, 2), neighbourhood=2, seed=11)
    assert list(sampler) == [[8, 8, 9, 9, 3, 4, 6, 7], [5, 5, 7, 6, 2, 0, 3, 4], [9, 9, 4, 3, 6, 7, 8, 8]]
