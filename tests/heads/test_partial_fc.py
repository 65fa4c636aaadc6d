"""Partial FC beside the head alone: on one process, and on real ranks; its samples; its states."""

import copy
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metricface import heads
from metricface.distributed import gather, gather_plain, rank, world_size
from metricface.heads.base import Head
from metricface.heads.partial_fc import PartialFC, heads_in, sample_classes
from metricface.heads.reshard import (
    own_optimizer,
    reshard,
    reshard_optimizer,
    reshard_rows,
    sharded_names,
    sharded_parameters,
    whole_optimizer,
    whole_state,
)
from metricface.heads.shards import PER_CLASS, shard_of
from tests.heads.kinds import EVERY_KIND, KINDS, Kind, filled
from tests.ranks import on_ranks
from tests.vectors import case

C, D = 23, 5
COUNTS = {1: [11], 2: [7, 4], 4: [5, 0, 4, 2]}  # rows of each rank
WORLDS = pytest.mark.parametrize("ranks", COUNTS)
SOFTMAX = pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.head.is_softmax])


def batch(step: int = 0, rows: int = 11) -> tuple[Tensor, Tensor]:
    """Of all ranks; with the first and the last class of every shard of 2 and 4 ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, dtype=torch.float64, generator=generator) * 10.0
    edges = torch.tensor([0, 4, 5, 10, 11, 16, 17, 22])
    return x, torch.cat([edges, torch.randint(0, C, (rows,), generator=generator)])[:rows]


def after(head: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Loss, gradients and averages of a training step from the head's own state, that of embeddings for these rows."""
    x = x.clone().requires_grad_()
    head.zero_grad()
    loss = head(x, labels)
    loss.backward()
    inner = head.head if isinstance(head, PartialFC) else head
    assert isinstance(inner, Head)
    gradients = {name: parameter.grad for name, parameter in inner.named_parameters()}
    return {
        "loss": loss.detach(),
        "embeddings": x.grad,
        "gradients": {name: grad for name, grad in gradients.items() if grad is not None},
        "buffers": {name: buffer.clone() for name, buffer in inner.named_buffers()},
        "last": inner.last,
    }


def joined(found: dict[str, Any]) -> dict[str, Any]:
    """What one rank found, with the gradients of weight and bias from all of them."""
    for name in PER_CLASS:
        if name in found["gradients"]:
            found["gradients"][name] = gather_plain(found["gradients"][name])
    return found


def same(mine: Any, theirs: Any, rtol: float) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key], rtol) for key in mine)
    return torch.allclose(mine.double(), theirs.double(), rtol=rtol, atol=rtol, equal_nan=True)


def every_kind_on_a_rank(ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        head = PartialFC(filled(kind.make(C, D)))
        for step in range(2):
            x, labels = (torch.split(rows, COUNTS[ranks])[rank()] for rows in batch(step))
            found[f"{name} {step}"] = joined(after(head, x, labels))
        found[f"{name} classes"] = len(head.head.weight)
        found[f"{name} logits"] = head.logits(torch.split(batch()[0], COUNTS[ranks])[rank()])
        found[f"{name} vectors"] = head.class_vectors()
        found[f"{name} eval"] = head.eval()(x, labels).item()
        found[f"{name} without"] = head.class_weights_from(*batch(5, 40))
        found[f"{name} started"] = {key: gather_plain(head.head.get_parameter(key)) for key in found_per_class(head)}
        if kind.head.is_softmax:
            found[f"{name} sampled"] = sampled_on_a_rank(kind, ranks)
    return found


def found_per_class(head: PartialFC) -> list[str]:
    return [name for name, _ in head.head.named_parameters() if name in PER_CLASS]


def sampled_on_a_rank(kind: Kind, ranks: int) -> dict[str, Any]:
    head = PartialFC(filled(kind.make(C, D)), sampling_rate=0.6, seed=3)
    x, labels = batch()
    drawn = head._draw(labels)
    assert drawn is not None
    share = [torch.split(rows, COUNTS[ranks])[rank()] for rows in (x, labels)]
    return {"classes": gather_plain(drawn + int(head.held[0])), **joined(after(head, *share))}


@cache
def seen(ranks: int) -> list[dict[str, Any]]:
    return on_ranks(ranks, every_kind_on_a_rank, ranks)


@WORLDS
@EVERY_KIND
def test_ranks_give_the_loss_gradients_and_averages_of_the_head_alone_on_the_joined_batch(
    ranks: int, kind: Kind
) -> None:
    name = next(name for name, one in KINDS.items() if one is kind)
    alone = filled(kind.make(C, D))
    for step in range(2):  # the second one sees averages that the first one moved
        expected = after(alone, *batch(step))
        by_rows = torch.split(expected.pop("embeddings"), COUNTS[ranks])
        for number, one in enumerate(seen(ranks)):
            found = dict(one[f"{name} {step}"])
            # Times the ranks: DistributedDataParallel averages.
            assert same(found.pop("embeddings"), ranks * by_rows[number], 1e-10)
            assert same(found, expected, 1e-10)
    assert sum(one[f"{name} classes"] for one in seen(ranks)) == len(alone.weight)


@WORLDS
@EVERY_KIND
def test_logits_class_vectors_and_the_loss_outside_of_training_are_those_of_the_head_alone(
    ranks: int, kind: Kind
) -> None:
    name = next(name for name, one in KINDS.items() if one is kind)
    alone = filled(kind.make(C, D))
    for step in range(2):
        after(alone, *batch(step))
    logits = torch.split(alone.logits(batch()[0]), COUNTS[ranks])
    loss = alone.eval()(*batch(1)).item()
    for number, one in enumerate(seen(ranks)):
        assert same(one[f"{name} logits"], logits[number], 1e-12)
        assert torch.equal(one[f"{name} vectors"], alone.weight.detach())
        assert one[f"{name} eval"] == pytest.approx(loss, rel=1e-10)


@WORLDS
@EVERY_KIND
def test_a_warm_start_gives_every_rank_the_class_means_of_its_classes(ranks: int, kind: Kind) -> None:
    name = next(name for name, one in KINDS.items() if one is kind)
    alone = filled(kind.make(C, D))
    without = alone.class_weights_from(*batch(5, 40))
    assert without > 0
    for one in seen(ranks):
        assert one[f"{name} without"] == without
        for key, value in one[f"{name} started"].items():
            assert same(value, alone.get_parameter(key), 1e-12)


def restricted(kind: Kind, classes: Tensor) -> Head:
    """The head alone with those classes only."""
    whole, head = filled(kind.make(C, D)), kind.make(len(classes), D).double()
    state = whole.state_dict()
    for key in PER_CLASS:
        if key in state:
            rows = state[key].view(C, len(state[key]) // C, *state[key].shape[1:])[classes]
            state[key] = rows.reshape(-1, *state[key].shape[1:])
    head.load_state_dict(state)
    return head


@WORLDS
@SOFTMAX
def test_a_sample_gives_the_loss_and_gradients_of_the_head_with_those_classes_only(ranks: int, name: str) -> None:
    x, labels = batch()
    for number, one in enumerate(seen(ranks)):
        found = dict(one[f"{name} sampled"])
        classes = found.pop("classes")
        assert set(labels.tolist()) <= set(classes.tolist())
        head = restricted(KINDS[name], classes)
        expected = after(head, x, torch.searchsorted(classes, labels))
        by_rows = torch.split(expected.pop("embeddings"), COUNTS[ranks])
        assert same(found.pop("embeddings"), ranks * by_rows[number], 1e-10)
        for key in PER_CLASS:  # of classes that were not drawn: zero
            if key in expected["gradients"]:
                some = expected["gradients"][key]
                each = len(some) // len(classes)
                whole = some.new_zeros(C, each, *some.shape[1:])
                whole[classes] = some.view(len(classes), each, *some.shape[1:])
                expected["gradients"][key] = whole.view(C * each, *some.shape[1:])
        assert same(found, expected, 1e-10)


@EVERY_KIND
@pytest.mark.parametrize("streaming", [False, True])
def test_one_process_without_a_group_gives_loss_and_gradients_of_the_head_alone(kind: Kind, streaming: bool) -> None:
    alone = filled(kind.make(C, D, streaming=streaming))
    mine = PartialFC(filled(kind.make(C, D, streaming=streaming)))
    for step in range(2):
        assert same(after(mine, *batch(step)), after(alone, *batch(step)), 1e-12)
    assert same(mine.logits(batch()[0]), alone.logits(batch()[0]), 1e-14)
    assert same(mine.losses(*batch()).detach(), alone.losses(*batch()).detach(), 1e-12)


# --- what is drawn


def test_the_sample_is_that_of_the_published_example() -> None:
    vector = case("B6.partial_fc_sampling")
    classes, expected = vector["inputs"]["n"], vector["expected"]
    generator = torch.Generator().manual_seed(0)
    first = sample_classes(torch.tensor([7, 2, 7]), classes, round(0.3 * classes), generator)
    assert len(first) == expected["size1"]
    assert {2, 7} <= set(first.tolist())
    labels = torch.tensor([7, 2, 5])
    second = sample_classes(labels, classes, round(0.2 * classes), generator)
    assert second.tolist() == expected["idx2"]
    assert torch.searchsorted(second, labels).tolist() == expected["relabel2"]


@pytest.mark.parametrize("quota", [0, 1, 3, 4, 17, 40])
def test_a_sample_holds_all_positives_no_class_twice_and_as_many_as_asked_for(quota: int) -> None:
    generator = torch.Generator().manual_seed(quota)
    for _ in range(50):
        positives = torch.randint(0, 40, (int(torch.randint(0, 9, (1,), generator=generator)),), generator=generator)
        found = sample_classes(positives, 40, quota, generator).tolist()
        assert found == sorted(set(found))
        assert set(positives.tolist()) <= set(found) <= set(range(40))
        assert len(found) == max(quota, len(set(positives.tolist())))


def test_every_other_class_is_drawn_as_often_and_independent_of_the_rest() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = 4000
    found = [tuple(sample_classes(torch.tensor([4, 2, 4]), 8, 4, generator).tolist()) for _ in range(draws)]
    pairs = Counter(tuple(c for c in one if c not in (2, 4)) for one in found)
    assert len(pairs) == math.comb(6, 2)  # 2 of the 6 others
    expected = draws / len(pairs)
    chi_squared = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert chi_squared < 36.1  # 14 degrees of freedom: exceeded once in 1000


def drawn(head: PartialFC, labels: Tensor) -> list[int]:
    found = head._draw(labels)
    assert found is not None
    return found.tolist()


def test_draws_follow_seed_shard_and_step_and_go_on_from_a_saved_state() -> None:
    labels = torch.tensor([3, 50, 99])
    head = PartialFC(heads.CosFace(100, D), sampling_rate=0.2)
    found: list[list[int]] = []
    state: dict[str, Any] = {}
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(head.state_dict())
        found.append(drawn(head, labels))
        assert drawn(head, labels) == found[-1]  # until the step is over
        head(torch.randn(3, D), labels)
    assert len({tuple(one) for one in found}) == 4
    assert all(len(one) == 20 for one in found)
    other = PartialFC(heads.CosFace(100, D), sampling_rate=0.2, seed=9)
    assert drawn(other, labels) != found[0]
    other.load_state_dict(state)
    assert drawn(other, labels) == found[2]
    other(torch.randn(3, D), labels)
    assert drawn(other, labels) == found[3]


def test_each_rank_draws_its_quota_of_its_own_classes_and_not_what_others_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.heads.partial_fc.world_size", lambda: 3)
    found = []
    for number in range(3):
        monkeypatch.setattr("metricface.heads.partial_fc.rank", lambda number=number: number)
        found.append(drawn(PartialFC(heads.CosFace(302, D), sampling_rate=0.25), torch.tensor([0, 100, 101])))
    assert [len(one) for one in found] == [25, 25, 25]  # of 100, 101 and 101
    assert found[0][0] == 0
    assert found[1][:2] == [0, 1]
    assert len({tuple(one[2:]) for one in found}) == 3
    assert len(set(found[1]) & set(found[2])) < 15


def test_outside_of_training_all_classes_count_and_nothing_is_drawn() -> None:
    alone, mine = filled(heads.ArcFace(C, D)), PartialFC(filled(heads.ArcFace(C, D)), sampling_rate=0.2)
    expected = alone(*batch()).item()
    assert mine.eval()(*batch()).item() == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        assert mine.train()(*batch()).item() == pytest.approx(expected, rel=1e-12)
    assert mine.step.item() == 0
    assert mine(*batch()).item() < expected  # fewer classes
    assert mine.step.item() == 1


def test_classes_that_were_not_drawn_have_no_gradient_and_move_by_momentum_and_decay_alone() -> None:
    head = PartialFC(filled(heads.Softmax(C, D)), sampling_rate=0.5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    labels = torch.tensor([1, 2])
    for _ in range(3):
        chosen = drawn(head, labels)
        rest = sorted(set(range(C)) - set(chosen))
        before = head.head.weight.detach().clone()
        state = optimizer.state[head.head.weight].get("momentum_buffer")
        buffer = torch.zeros_like(before) if state is None else state.clone()
        optimizer.zero_grad()
        head(torch.randn(2, D, dtype=torch.float64), labels).backward()
        assert head.head.weight.grad is not None
        assert not head.head.weight.grad[rest].any()
        assert head.head.weight.grad[chosen].any(dim=1).all()
        optimizer.step()
        expected = before - 0.1 * (0.9 * buffer + 0.01 * before)
        assert torch.allclose(head.head.weight[rest], expected[rest], rtol=1e-12)


# --- many steps, and other numbers of ranks


def trunk() -> nn.Linear:
    layer = nn.Linear(D, D, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(D) + 0.1)
        layer.bias.zero_()
    return layer


def optimizer_of(layer: nn.Module, head: nn.Module) -> torch.optim.SGD:
    parameters = [*layer.parameters(), *head.parameters()]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def steps_on(layer: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
    for step in range(first, first + 3):
        x, labels = (rows.tensor_split(world_size())[rank()] for rows in batch(step, 10 + step))
        optimizer.zero_grad()
        head(layer(x), labels).backward()
        optimizer.step()


def go_on(name: str, first: int, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Three steps from the states of this many ranks, or from the start: the new states."""
    layer, head = trunk(), PartialFC(filled(KINDS[name].make(C, D)))
    optimizer = optimizer_of(layer, head)
    if states:
        mine = states[rank()]
        layer.load_state_dict(mine["layer"])
        head.load_state_dict(mine["head"])
        optimizer.load_state_dict(mine["optimizer"])
    steps_on(DistributedDataParallel(layer) if world_size() > 1 else layer, head, optimizer, first)
    return {"layer": layer.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}


def go_on_from_one_file(path: Path, first: int) -> dict[str, Any]:
    """Three steps from what the first of any number of ranks has written: what it would write again."""
    found = {}
    for name, state in torch.load(path, weights_only=True).items():
        layer, head = trunk(), PartialFC(filled(KINDS[name].make(C, D)))
        optimizer = optimizer_of(layer, head)
        if state:
            layer.load_state_dict(state["layer"])
            head.load_state_dict(state["head"])
            optimizer.load_state_dict(own_optimizer(state["optimizer"], optimizer, head))
        steps_on(DistributedDataParallel(layer) if world_size() > 1 else layer, head, optimizer, first)
        assert len(optimizer.state[head.head.weight]["momentum_buffer"]) == len(head.head.weight)
        found[name] = {
            "layer": layer.state_dict(),
            "head": whole_state(head.state_dict()),
            "optimizer": whole_optimizer(optimizer, head),
        }
    return found


def test_a_file_of_the_first_rank_is_gone_on_from_by_any_number_of_ranks(tmp_path: Path) -> None:
    names = ["softmax", "sub-center", "normface"]
    states: dict[str, Any] = dict.fromkeys(names)
    for i, ranks in enumerate((4, 2, 3)):
        torch.save(states, tmp_path / "states")
        states, other, *_ = on_ranks(ranks, go_on_from_one_file, tmp_path / "states", 3 * i)
        for name in names:
            assert len(states[name]["head"]["head.weight"]) == len(filled(KINDS[name].make(C, D)).weight)
            assert len(other[name]["head"]["head.weight"]) == 0  # nothing is held twice
    torch.save(states, tmp_path / "states")
    states = go_on_from_one_file(tmp_path / "states", 9)
    for name in names:
        layer, alone = trunk(), filled(KINDS[name].make(C, D))
        optimizer = optimizer_of(layer, alone)
        for first in (0, 3, 6, 9):
            steps_on(layer, alone, optimizer, first)
        assert same(states[name]["layer"], layer.state_dict(), 1e-9)
        inner = {key[5:]: value for key, value in states[name]["head"].items() if key.startswith("head.")}
        assert same(inner, alone.state_dict(), 1e-9)
        for number, state in optimizer.state_dict()["state"].items():
            assert same(states[name]["optimizer"]["state"][number], state, 1e-9)


def joined_beforehand() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a PartialFC says of this rank's rows, and of the joined ones."""
    found = []
    for before in (False, True):
        head = PartialFC(filled(heads.CosFace(C, D)), sampling_rate=0.6)
        x, labels = (torch.split(rows, COUNTS[world_size()])[rank()].clone() for rows in batch())
        x.requires_grad_()
        loss = head.of_joined(gather(x, averaged=True), gather_plain(labels)) if before else head(x, labels)
        loss.backward()
        found.append({"loss": loss.detach(), "x": x.grad, "weight": head.head.weight.grad, "step": head.step})
    return found[0], found[1]


def test_a_batch_may_be_joined_beforehand() -> None:
    for one, other in on_ranks(2, joined_beforehand):
        assert same(one, other, 1e-14)


def go_on_from(path: Path, names: list[str], first: int) -> dict[str, Any]:
    before = torch.load(path, weights_only=False)
    return {name: go_on(name, first, before[name]) for name in names}


def for_ranks(found: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    head = [one["head"] for one in found]
    sharded = [2 + i for i, name in enumerate(n for n in head[0] if n.startswith("head.")) if name[5:] in PER_CLASS]
    optimizers = reshard_optimizer([one["optimizer"] for one in found], sharded, C, ranks)
    return [
        {"layer": found[0]["layer"], "head": state, "optimizer": optimizer}
        for state, optimizer in zip(reshard(head, ranks), optimizers, strict=True)
    ]


def test_training_goes_on_from_4_to_2_to_3_ranks_to_1_as_in_one_process_with_the_head_alone(tmp_path: Path) -> None:
    names = ["softmax", "sub-center", "normface"]  # with biases, with several vectors for a class, with a learned scale
    states: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i, ranks in enumerate((4, 2, 3)):
        torch.save(states, tmp_path / "states")
        found = on_ranks(ranks, go_on_from, tmp_path / "states", names, 3 * i)
        following = (2, 3, 1)[i]
        states = {name: for_ranks([one[name] for one in found], following) for name in names}
    for name in names:
        end = go_on(name, 9, states[name])
        layer, alone = trunk(), filled(KINDS[name].make(C, D))
        optimizer = optimizer_of(layer, alone)
        for first in (0, 3, 6, 9):
            steps_on(layer, alone, optimizer, first)
        assert same(end["layer"], layer.state_dict(), 1e-9)
        inner = {key[5:]: value for key, value in end["head"].items() if key.startswith("head.")}
        assert same(inner, alone.state_dict(), 1e-9)
        for number, state in optimizer.state_dict()["state"].items():
            assert same(end["optimizer"]["state"][number], state, 1e-9)


def states_of(ranks: int) -> list[dict[str, Tensor]]:
    """Of 10 classes with 2 vectors each."""
    whole = PartialFC(heads.SubCenterArcFace(10, 3, sub_centers=2))
    return reshard([whole.state_dict()], ranks)


def test_a_state_says_which_classes_it_holds_and_fits_no_other_rank() -> None:
    states = states_of(4)
    assert [state["held"].tolist() for state in states] == [[0, 2, 10], [2, 5, 10], [5, 7, 10], [7, 10, 10]]
    assert [len(state["head.weight"]) for state in states] == [4, 6, 4, 6]
    with pytest.raises(ValueError, match=r"holds classes 2 to 4 of 10; this rank holds 0 to 9 of 10. Pass"):
        PartialFC(heads.SubCenterArcFace(10, 3, sub_centers=2)).load_state_dict(states[1])


def test_resharding_loses_nothing_and_shares_no_memory() -> None:
    first = states_of(1)
    back = first
    for ranks in (4, 2, 3, 10, 1):
        back = reshard(back[::-1], ranks)
        assert len(back) == ranks
        assert len({value.data_ptr() for state in back for value in state.values()}) == ranks * len(back[0])
    assert same(back[0], first[0], 0.0)


def test_states_that_are_not_those_of_all_ranks_are_refused() -> None:
    states = states_of(4)
    for wrong in ([], states[:3], states[1:], [*states, states[0]], [states[0], states[2], states[3]]):
        with pytest.raises(ValueError, match="needs the state of every rank, once each; found those of classes"):
            reshard(wrong, 2)
    for ranks in (0, 11):
        with pytest.raises(
            ValueError, match=rf"Each of {ranks} ranks needs at least one class of its own; there are 10"
        ):
            reshard(states, ranks)
    with pytest.raises(ValueError, match="7 rows are no multiple of 10 classes"):
        reshard_rows([torch.ones(4), torch.ones(3)], 10, 2)


@pytest.mark.parametrize(("classes", "ranks"), [(10, 1), (10, 4), (7, 7), (1_000_003, 8)])
def test_shards_are_all_classes_in_order_and_differ_by_one_at_most(classes: int, ranks: int) -> None:
    shards = [shard_of(classes, r, ranks) for r in range(ranks)]
    assert [c for shard in shards for c in (shard.start, shard.stop)][1:-1:2] == [shard.start for shard in shards[1:]]
    assert shards[0].start == 0
    assert shards[-1].stop == classes
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


# --- what is refused, and what else heads promise


def bad_batches_on_a_rank() -> list[str]:
    messages = []
    x, labels = torch.ones(2, D), torch.tensor([0, 1])
    for wrong in ((x * math.nan, labels), (x, labels + C), (x[:, 1:], labels), (x, labels[:1])):
        head = PartialFC(heads.CosFace(C, D))
        try:
            head(*(wrong if rank() == 1 else (x, labels)))
        except ValueError as error:
            messages.append(str(error))
        head(x, labels)  # the ranks are still together
    return messages


def test_a_batch_that_one_rank_refuses_is_refused_on_all_and_none_waits() -> None:
    found = on_ranks(2, bad_batches_on_a_rank)
    assert [len(messages) for messages in found] == [4, 4]
    assert all(message.startswith("Rank 1 refused its batch") for message in found[0])
    for message, part in zip(found[1], ("NaN", "must lie in [0, 23)", "floating (batch, 5)", "(2,)"), strict=True):
        assert part in message


def test_sums_over_classes_and_nearest_classes_are_not_sampled() -> None:
    for name in ("sphereface2", "c-contrastive", "c-triplet", "c-triplet, hardest", "npt"):
        with pytest.raises(ValueError, match=r"is no softmax: it adds up .* Pass sampling_rate=1; got 0.5"):
            PartialFC(KINDS[name].make(C, D), sampling_rate=0.5)


def test_options_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in (0.0, -0.1, 1.1, math.nan, "1", True):
        with pytest.raises(ValueError, match=r"sampling_rate must lie in \(0, 1\]"):
            PartialFC(heads.CosFace(C, D), sampling_rate=rate)  # type: ignore[arg-type]
    for seed in (-1, 1.5, None, True):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            PartialFC(heads.CosFace(C, D), seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wraps a head of metricface.heads; got Linear"):
        PartialFC(nn.Linear(3, 4))  # type: ignore[arg-type]
    head = heads.CosFace(C, D)
    PartialFC(head)
    with pytest.raises(ValueError, match="inside a PartialFC already"):
        PartialFC(head)
    monkeypatch.setattr("metricface.heads.partial_fc.world_size", lambda: C + 1)
    with pytest.raises(ValueError, match="Each of 24 ranks needs at least one class"):
        PartialFC(heads.CosFace(C, D))


def test_a_group_that_came_after_the_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = PartialFC(heads.CosFace(C, D))
    monkeypatch.setattr("metricface.heads.partial_fc.world_size", lambda: 2)
    with pytest.raises(ValueError, match="built for classes 0 to 22 of 23 on rank 0, with another number of ranks"):
        head(torch.ones(2, D), torch.tensor([0, 1]))


@EVERY_KIND
def test_the_head_inside_does_not_pass_its_shard_for_all_classes(kind: Kind) -> None:
    head = kind.make(C, D)
    PartialFC(head)
    x, labels = torch.ones(2, D), torch.tensor([0, 1])
    for call in (lambda: head(x, labels), lambda: head.logits(x)):
        with pytest.raises(ValueError, match="call the PartialFC, not its head"):
            call()


def test_numbers_of_the_head_are_still_read_and_changed_there() -> None:
    inner = heads.CosFace(C, D, margin_cos=0.35)
    head = PartialFC(filled(inner))
    inner.margin_cos = 0.1
    other = filled(heads.CosFace(C, D, margin_cos=0.1))
    assert head(*batch()).item() == pytest.approx(other(*batch()).item(), rel=1e-12)
    assert "classes 0 to 22 of 23, sampling_rate=1" in str(head)
    assert "margin_cos=0.1" in str(head)


def test_half_precision_weights_are_sampled_and_multiplied_in_float32() -> None:
    alone = heads.ArcFace(C, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine = PartialFC(copy.deepcopy(alone), sampling_rate=0.5)
    x, labels = batch()
    rows = torch.tensor(drawn(mine, labels))
    loss = mine(x.bfloat16(), labels)
    loss.backward()
    part = heads.ArcFace(len(rows), D)
    with torch.no_grad():
        part.weight.copy_(alone.weight[rows].float())
    assert loss.dtype == torch.float32
    assert mine.head.weight.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(part(x.bfloat16(), torch.searchsorted(rows, labels)).item(), rel=1e-5)


def test_a_copy_of_a_partial_fc_reads_its_own_classes() -> None:
    head = PartialFC(filled(heads.CosFace(C, D)))
    other = copy.deepcopy(head)
    with torch.no_grad():
        other.head.weight.neg_()
    assert other.head.classes is other.shard
    assert other(*batch()).item() != head(*batch()).item()


def test_an_empty_batch_is_zero_with_zero_gradient() -> None:
    head = PartialFC(heads.CosFace(C, D), sampling_rate=0.5)
    loss = head(torch.empty(0, D), torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert head.head.weight.grad is not None
    assert not head.head.weight.grad.any()


def test_a_rate_that_rounds_to_no_class_leaves_one() -> None:
    head = PartialFC(filled(heads.CosFace(C, D)), sampling_rate=0.01)
    assert len(drawn(head, torch.empty(0, dtype=torch.long))) == 1
    loss = head(batch()[0][:1], torch.tensor([4]))  # its own class alone: nothing to be told apart from
    assert loss.item() == 0.0


def test_what_is_sharded_and_what_is_a_head_is_found_by_looking() -> None:
    partial, plain = PartialFC(heads.NormFace(10, D)), heads.Softmax(10, D)
    both = nn.ModuleDict({"partial": partial, "plain": plain, "other": nn.Linear(2, 2)})
    assert sharded_names(both) == ["partial.held", "partial.head.weight"]
    assert sharded_parameters(both) == [partial.head.weight]  # the learned scale is everybody's
    assert heads_in(both) == [partial, plain]
