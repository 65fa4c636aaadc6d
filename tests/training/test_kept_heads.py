"""Heads that go on in the next stage where they stood at the end of the one before."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from metricface.heads.base import Head
from metricface.heads.partial_fc import heads_in
from metricface.training import loop, stages
from metricface.training.assemble import objective
from metricface.training.contradictions import check
from metricface.training.loop import train
from metricface.training.recipe import Component, Recipe, Stage, Term, default_stages
from tests.training.test_loop import after, assert_same, quiet, weights


@pytest.fixture
def kept(recipe: Recipe) -> Recipe:
    """The second stage has the first one's head beside its triplets."""
    first, second = recipe.stages
    assert first.head is not None
    second.plus = [Term("classes", head=Component("CosFace", first.head.options | {"margin_cos": 0.2}))]
    second.keep_head = True
    return recipe


def heads_at_stage_starts(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What the objective of each stage holds before its first step, and after the last of the first stage."""
    seen: list[dict[str, Tensor]] = []
    real = stages.train

    def looking(run, *arguments, **named):  # type: ignore[no-untyped-def]
        seen.append({key: value.clone() for key, value in run.objective.state_dict().items()})
        real(run, *arguments, **named)
        seen.append({key: value.clone() for key, value in run.objective.state_dict().items()})

    monkeypatch.setattr(stages, "train", looking)
    train(recipe, folder, say=quiet)
    return seen


@pytest.mark.parametrize("partial_fc", [None, 0.5])
def test_a_kept_head_goes_on_where_it_stood(
    kept: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial_fc: float | None
) -> None:
    kept.stages[0].partial_fc = kept.stages[1].plus[0].partial_fc = partial_fc
    first, ended, second, _ = heads_at_stage_starts(kept, tmp_path / "run", monkeypatch)
    weight = next(key for key in ended if key.startswith("_registered.0.") and key.endswith("weight"))
    assert not torch.equal(first[weight], ended[weight])
    assert torch.equal(second[weight.replace("_registered.0.", "_registered.1.")], ended[weight])


def test_class_means_are_for_new_heads_and_not_for_one_that_fades_out(
    kept: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = kept.stages[1]
    second.keep_head, second.class_means, second.fade = False, True, 0.8
    _, ended, started, _ = heads_at_stage_starts(kept, tmp_path / "run", monkeypatch)
    assert torch.equal(started["_registered.2.head.weight"], ended["_registered.0.head.weight"])
    assert not torch.equal(started["_registered.1.head.weight"], ended["_registered.0.head.weight"])


def test_without_any_head_there_is_nothing_to_keep(
    kept: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.stages[1].plus = []
    monkeypatch.setattr(loop, "keep_best", lambda run, under_way: False)
    monkeypatch.setattr(stages, "embed", lambda *_, **__: pytest.fail("class means were made"))
    assert not any("class means" in note for note in train(kept, tmp_path / "run", say=quiet).notes)


def test_a_head_that_is_not_kept_is_new(kept: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.stages[1].keep_head = False
    _, ended, second, _ = heads_at_stage_starts(kept, tmp_path / "run", monkeypatch)
    assert not torch.equal(second["_registered.1.head.weight"], ended["_registered.0.head.weight"])


@pytest.mark.parametrize("fade", [None, 0.5])
def test_a_run_with_a_kept_head_resumes_to_the_bit(kept: Recipe, tmp_path: Path, fade: float | None) -> None:
    kept.stages[1].fade = fade
    whole = train(kept, tmp_path / "whole", say=quiet)
    for steps in (6, 8):
        folder = tmp_path / str(steps)
        assert train(kept, folder, stopped=after(steps), say=quiet).interrupted
        assert_same(weights(whole), weights(train(kept, folder, resume=True, say=quiet)))


def test_where_the_stage_before_was_not_kept_heads_start_from_class_means(kept: Recipe, tmp_path: Path) -> None:
    kept.stages.insert(0, Stage("good", sampler=kept.stages[0].sampler, head=kept.stages[0].head, steps=12))
    # Adam: three steps at such a rate leave every image its own random place, and no loss that is not finite.
    kept.stages[1].optimizer = Component("Adam")
    kept.stages[1].steps, kept.stages[1].learning_rate = 3, 10.0
    run = train(kept, tmp_path / "run", say=quiet)
    assert "Stage 'triplet': the stage before it was not kept; heads start from class means." in run.notes


def test_the_default_stages_keep_what_the_head_has_learned() -> None:
    """Class means a tenth as long as trained vectors were scattered by the first steps, and the network with them."""
    recipe = Recipe()
    first, second = (objective(stage, recipe, 20) for stage in default_stages())
    rows, labels = torch.randn(40, recipe.model.embedding_dim), torch.arange(20).repeat(2)
    sgd = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        sgd.zero_grad()
        first(rows, labels).backward()
        sgd.step()
    second.go_on_with(first.state_dict(), recipe.stages[1].kept_heads(recipe.stages[0]))
    sgd = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        sgd.zero_grad()
        second(rows, labels).backward()
        sgd.step()
        losses.append(float(second.values["classes"]))
    assert max(losses) < 1.1 * losses[0]


def test_class_means_are_as_long_as_trained_vectors_and_stay_where_they_are() -> None:
    recipe = Recipe()
    goal = objective(default_stages()[0], recipe, 20)
    labels = torch.arange(20).repeat(6)
    rows = torch.randn(20, recipe.model.embedding_dim)[labels] + 0.5 * torch.randn(120, recipe.model.embedding_dim)
    (head,) = heads_in(goal)
    assert isinstance(head, Head)
    assert float(head.weight.detach().norm(dim=1).mean()) < 0.2
    head.class_weights_from(rows, labels)
    torch.testing.assert_close(head.weight.detach().norm(dim=1), torch.ones(20))
    sgd = torch.optim.SGD(goal.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        sgd.zero_grad()
        loss = goal(rows, labels)
        loss.backward()
        sgd.step()
        losses.append(float(loss.detach()))
    assert max(losses) <= losses[0]


@pytest.mark.parametrize(
    ("head", "partial_fc", "says"),
    [("ArcFace", None, "ArcFace of its term 'classes' is to go on"), ("CosFace", 1.0, "has no such head")],
)
def test_a_head_that_the_stage_before_does_not_have_cannot_go_on(
    kept: Recipe, head: str, partial_fc: float | None, says: str
) -> None:
    kept.stages[1].plus[0].head = Component(head)
    kept.stages[1].plus[0].partial_fc = partial_fc
    with pytest.raises(ValueError, match=says):
        check(kept)


def test_a_first_stage_has_no_head_to_keep(kept: Recipe) -> None:
    kept.stages[0].keep_head = True
    with pytest.raises(ValueError, match="no stage before it"):
        check(kept)


def test_heads_start_from_class_means_or_go_on(kept: Recipe) -> None:
    kept.stages[1].class_means = True
    with pytest.raises(ValueError, match="leave one out"):
        check(kept)


def test_without_its_second_head_the_default_is_triplets_alone() -> None:
    recipe = Recipe()
    recipe.stages[1].plus = []
    check(recipe)


def test_a_head_of_other_sizes_is_refused_before_training(kept: Recipe, tmp_path: Path) -> None:
    kept.stages[0].head = Component("SubCenterArcFace", {"sub_centers": 2})
    kept.stages[1].plus[0].head = Component("SubCenterArcFace", {"sub_centers": 3})
    with pytest.raises(ValueError, match="classes cannot go on from the stage before"):
        train(kept, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()
