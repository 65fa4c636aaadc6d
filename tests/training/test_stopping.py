"""A stop that is asked for while images are embedded: the pass is left at once, and a resumed run makes it anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metricface.data.images import ImageSet, UnreadableImageError
from metricface.distributed import rank
from metricface.training import held_out, look_alikes, stages
from metricface.training.held_out import embed
from metricface.training.interrupt import StoppedError
from metricface.training.loop import train
from metricface.training.people import gather
from metricface.training.recipe import Component, LookAlikes, Recipe, Term, Watch
from tests.ranks import on_ranks
from tests.training.conftest import tiny_recipe
from tests.training.test_loop import assert_same, quiet, weights

CPU = torch.device("cpu")
FEW = 4  # images in a batch of a pass, so that every pass has several


def recipe_of_many_passes() -> Recipe:
    """Held-out people scored before, on its way and after; class means; look-alikes."""
    recipe = tiny_recipe()
    stage = recipe.stages[1]
    stage.sampler = Component(
        "LookAlikeBatchSampler", {"identities_per_batch": 6, "images_per_identity": 2, "neighbourhood": 3}
    )
    stage.look_alikes, stage.watch = LookAlikes(neighbours=5), Watch(at=[0.5])
    stage.plus, stage.class_means = [Term("classes", head=Component("CosFace", {"scale": 16.0}))], True
    return recipe


class StopEveryPassOnce:
    """Asks to stop after the first batch of each pass over images that has not been left before."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left: set[Any] = set()
        self.made: set[Any] = set()
        self.batches = 0
        self._under_way: Any = None
        for module in (held_out, stages, look_alikes):
            patch.setattr(module, "embed", self._embed)
        batches = held_out._batches

        def counted(images: ImageSet, own: range) -> Any:
            for batch in batches(images, own):
                self.batches += 1
                yield batch

        patch.setattr(held_out, "BATCH", FEW)
        patch.setattr(held_out, "_batches", counted)

    def __call__(self) -> bool:
        return self._under_way is not None and self._under_way not in self.left

    def _embed(self, model: nn.Module, images: ImageSet, *arguments: Any, **options: Any) -> Any:
        first = next(model.parameters())
        self._under_way = (len(images), options.get("unit", True), float(first.detach().double().sum()))
        self.batches = 0
        try:
            found = embed(model, images, *arguments, **options)
        except StoppedError:
            assert self.batches == 2  # it was asked before the second one was embedded
            self.left.add(self._under_way)
            raise
        finally:
            key, self._under_way = self._under_way, None
        self.made.add(key)
        return found


def test_a_run_stopped_in_every_pass_over_images_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = StopEveryPassOnce(monkeypatch)
    whole = train(recipe_of_many_passes(), tmp_path / "whole", say=quiet)
    passes, stops.made = stops.made, set()
    sessions = 1
    run = train(recipe_of_many_passes(), tmp_path / "run", stopped=stops, say=quiet)
    while run.interrupted:
        assert not (tmp_path / "run" / "report.json").exists()
        run = train(recipe_of_many_passes(), tmp_path / "run", resume=True, stopped=stops, say=quiet)
        sessions += 1
    # Start and two ends, each of validation and test people; a look at validation people; class means; look-alikes.
    assert (len(stops.left), sessions) == (9, 10)
    assert stops.made == stops.left == passes
    assert_same(weights(run), weights(whole))
    assert [vars(moment) for moment in run.history] == [vars(moment) for moment in whole.history]
    assert run.notes == whole.notes


def test_a_set_of_one_batch_is_embedded_without_asking() -> None:
    people = gather(tiny_recipe().data, 0).validation
    assert len(embed(nn.Flatten(), people, CPU, stopped=lambda: True)) == len(people)


def embedding_on_ranks(fault: str) -> str:
    """What each rank is told where the second one is asked to stop, or cannot read an image."""
    here = rank() == 1
    real = held_out._inputs

    def inputs(images: ImageSet, indices: range) -> torch.Tensor:
        if here and fault == "image" and 40 in indices:
            raise UnreadableImageError("gone.png", "it has gone")
        return real(images, indices)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(held_out, "BATCH", FEW)
            patch.setattr(held_out, "_inputs", inputs)
            images = gather(tiny_recipe().data, 0).test
            embed(nn.Flatten(), images, CPU, shared=True, stopped=lambda: here and fault == "stop")
    except (StoppedError, UnreadableImageError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_ends_the_pass_of_one_rank_ends_that_of_all() -> None:
    first, second = on_ranks(2, embedding_on_ranks, "stop")
    assert first == "StoppedError: Another rank was asked to stop."
    assert second.startswith("StoppedError")
    first, second = on_ranks(2, embedding_on_ranks, "image")
    assert first == "UnreadableImageError: Another rank could not read an image, and says which."
    assert "gone.png" in second
    assert on_ranks(2, embedding_on_ranks, "none") == ["nothing", "nothing"]


def test_a_shared_pass_gives_every_rank_the_rows_of_one_process() -> None:
    whole = embed(nn.Flatten(), gather(tiny_recipe().data, 0).test, CPU)
    for found in on_ranks(2, embedded_on_ranks):
        np.testing.assert_array_equal(found, whole)


def embedded_on_ranks() -> Any:
    return embed(nn.Flatten(), gather(tiny_recipe().data, 0).test, CPU, shared=True)
