"""What a stage minimises: a weighted sum of heads, and of losses on mined tuples.

Embeddings in, one scalar and named figures out.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metricface.diagnostics import mining_statistics, pair_statistics
from metricface.distances import Distance
from metricface.heads.base import Head
from metricface.heads.partial_fc import PartialFC
from metricface.losses import MarginBasedLoss, TripletLoss, mined
from metricface.miners import EmbeddingMemory, RandomMiner
from metricface.miners.memory import References
from metricface.training.recipe import Schedule
from metricface.training.schedules import scheduled
from metricface.tuples import Pairs

BEFORE = "before/"  # in the names of parts that fade out
SHARES = ("active_share", "easy_share", "semi_hard_share", "hard_share")


class HeadObjective(nn.Module):
    """A classification head on raw embeddings.

    joined: whether the batches are those of all ranks; a PartialFC joins the others itself.
    """

    def __init__(self, head: Head | PartialFC, *, joined: bool = True) -> None:
        super().__init__()
        self.head = head
        self._joined = joined

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The head's loss: embeddings (B, D), labels (B,), scalar."""
        if self._joined and isinstance(self.head, PartialFC):
            return self.head.of_joined(embeddings, labels)
        loss: Tensor = self.head(embeddings, labels)
        return loss

    @property
    def on_schedule(self) -> Head:
        """Whose margins and scale may change on the way."""
        return self.head.head if isinstance(self.head, PartialFC) else self.head

    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the head says of the batch that `forward` saw last: how much it classifies rightly, and more."""
        return {f"head/{name}": value for name, value in (self.head.last or {}).items()}


class MinedObjective(nn.Module):
    """A pair or triplet loss on what a miner picks from the batch; without a miner, on all of it.

    memory: of earlier batches, whose embeddings stand beside the batch's own as positives and negatives of its anchors.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module | None, memory: EmbeddingMemory | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner
        self.memory = memory
        self._mined: Sequence[Tensor] | None = None
        self._references: References | None = None
        # Where nothing is mined, d_ap and d_an are shown of random triplets, drawn without touching training's draws.
        self._sampler = RandomMiner(generator=torch.Generator().manual_seed(0))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of the mined tuples: embeddings (B, D), labels (B,), scalar; 0 where nothing was mined.

        The memory, if there is one, then takes the batch in.
        """
        beside: dict[str, Tensor] = {}
        if self.memory is not None:
            beside = self.memory.with_batch(embeddings, labels)._asdict()
        found = {name: value.detach() for name, value in beside.items()}
        self._mined = None if self.miner is None else self.miner(embeddings.detach(), labels, **found)
        loss: Tensor = self.loss(embeddings, labels, self._mined, **beside)
        if self.memory is not None:
            self._references = References(**found)
            self.memory.add(embeddings, labels)
        return loss

    @torch.no_grad()
    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What mining offered in the batch that `forward` saw last, and what the loss says of it.

        Where nothing mined and the loss says nothing, d_ap and d_an of a sample of its triplets.
        """
        seen: dict[str, Tensor] | None = getattr(self.loss, "last", None)
        kind = "mining" if mines_for_itself(self.loss) else "loss"
        told = {f"{kind}/{name}": value for name, value in (seen or {}).items()}
        if self._mined is not None:
            return told | {f"mining/{name}": value for name, value in self._of(self._mined, embeddings, labels).items()}
        if told:
            return told
        # Of the batch alone: an index of its rows is the same among the references, where they come first.
        sample = self._sampler(embeddings.detach(), labels)
        return {f"random/{name}": value for name, value in self._of(sample, embeddings, labels).items()}

    def _of(self, found: Sequence[Tensor], embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Statistics of three index tensors of triplets, or four of pairs, in the loss's own distance."""
        rows = embeddings.detach()
        distance: Distance = getattr(self.loss, "distance", "euclidean")
        normalize: bool = getattr(self.loss, "normalize", True)
        beside = {} if self._references is None else {"ref_emb": self._references.ref_emb}
        if len(found) == 4:
            return pair_statistics(rows, Pairs(*found), distance=distance, normalize=normalize, **beside)
        # Asked each time: a schedule may change it.
        margin = _triplet_margin(self.loss)
        if self._references is not None:
            beside["ref_labels"] = self._references.ref_labels
        known = mining_statistics(
            rows,
            labels,
            found,
            margin=0.0 if margin is None else margin,
            distance=distance,
            normalize=normalize,
            **beside,
        )
        return known if margin is not None else {name: value for name, value in known.items() if name not in SHARES}


class GivenPairs(nn.Module):
    """In place of a miner: the pairs that a PairBatchSampler composed the batch of, the same places in every batch."""

    def __init__(self, indices_tuple: Sequence[Tensor]) -> None:
        super().__init__()
        self.pairs = tuple(indices_tuple)

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """(a1, p, a2, n), on the device of `embeddings`."""
        return tuple(index.to(embeddings.device) for index in self.pairs)


def mines_for_itself(loss: nn.Module) -> bool:
    """Whether the loss is one of metricface.losses.mined, which take no miner."""
    return type(loss).__module__ == mined.__name__


def _triplet_margin(loss: nn.Module) -> float | Literal["soft"] | None:
    """Below which d_an - d_ap a triplet has a loss; none where the loss does not compare the two distances."""
    if isinstance(loss, TripletLoss):
        return loss.margin
    # One of a triplet's two pairs violates beta -+ alpha wherever d_ap + 2 alpha > d_an.
    return 2.0 * loss.alpha if isinstance(loss, MarginBasedLoss) else None


Part = HeadObjective | MinedObjective


class SumObjective(nn.Module):
    """The weighted sum of named parts, some of whose numbers follow schedules.

    parts: the first is the stage's own, further ones its other terms. weights: the factor of each part, by its name.
    schedules: which number follows which curve: PART.NUMBER, a plain attribute of the part's head or loss, or
    PART.weight. before: the sum of the stage before, which fades out in a line over the share `fade` of the stage while
    this one comes in; its parts are then called before/NAME, and have the weights that stage left (`take_over`) and the
    numbers at the end of its schedules.
    After a call `values` holds each part's own loss, unweighted and without gradient; parts that have faded out
    are not computed.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        weights: Mapping[str, float],
        schedules: Mapping[str, Schedule],
        *,
        before: "SumObjective | None" = None,
        fade: float = 0.0,
    ) -> None:
        super().__init__()
        self._own = tuple(parts)
        old = {} if before is None else {name: f"{BEFORE}{name}" for name in before._own}
        self.parts: dict[str, Part] = dict(parts) | {
            called: before.parts[name] for name, called in old.items() if before is not None
        }
        # A list: a ModuleDict refuses names that are attributes of its own, such as "type".
        self._registered = nn.ModuleList(self.parts.values())
        self.weights = {name: weights[name] for name in parts}
        self.weights |= {called: before.weights[name] for name, called in old.items() if before is not None}
        self.schedules = dict(schedules)
        self.values: dict[str, Tensor] = {}
        self._fade = fade if old else 0.0
        self._come_in = 1.0

    @property
    def own(self) -> nn.ModuleList:
        """The parts that are this stage's, without those that fade out."""
        return nn.ModuleList(self.parts[name] for name in self._own)

    def take_over(self, state: Mapping[str, Tensor] | None) -> None:
        """Give the parts that fade out the state of the sum of the stage before; without one nothing fades.

        state: of that sum's `state_dict`; parts that were fading out there are gone.
        """
        if state is None:
            self._fade = 0.0
            return
        self.go_on_with(state, {name: place for place, name in enumerate(list(self.parts)[len(self._own) :])})

    def go_on_with(self, state: Mapping[str, Tensor], places: Mapping[str, int]) -> None:
        """Give each of these parts the state that the part at this place had in the sum of the stage before.

        state: of that sum's `state_dict`. Raises ValueError where a part has other sizes.
        """
        for name, place in places.items():
            prefix = f"_registered.{place}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            try:
                self.parts[name].load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(f"{name} cannot go on from the stage before, of other options: {error}") from error

    def follow(self, progress: float) -> dict[str, float]:
        """Set every scheduled number to its value at a share `progress` of the stage; return the values by key."""
        found = {}
        self._come_in = min(1.0, progress / self._fade) if self._fade else 1.0
        if self._fade:
            found["fade"] = self._come_in
        for key, schedule in self.schedules.items():
            value = float(scheduled(progress, shape=schedule.shape, points=schedule.points))
            name, _, number = key.partition(".")
            if number == "weight":
                self.weights[name] = value
            else:
                part = self.parts[name]
                setattr(part.on_schedule if isinstance(part, HeadObjective) else part.loss, number, value)
            found[key] = value
        return found

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The sum: embeddings (B, D) raw, labels (B,), scalar. Of several parts one that raises ValueError is named."""
        self.values = {}
        terms = []
        for name, part in self.parts.items():
            factor = self._come_in if name in self._own else 1.0 - self._come_in
            # One's own parts count from the first step on, with nothing: parameters that get their first gradient after
            # others have got theirs are more than torch's fused SGD can do.
            if factor == 0.0 and name not in self._own:
                continue
            try:
                loss: Tensor = part(embeddings, labels)
            except ValueError as error:
                if len(self.parts) == 1:
                    raise
                raise ValueError(f"{name}: {error}") from error
            self.values[name] = loss.detach()
            terms.append(factor * self.weights[name] * loss)
        return sum(terms[1:], start=terms[0])

    @torch.no_grad()
    def statistics(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Those of the parts, a further part's under its name; in a sum of several also each loss, unweighted.

        Of the parts that were computed in the batch that `forward` saw last.
        """
        found: dict[str, Tensor] = {}
        for place, (name, part) in enumerate(self.parts.items()):
            if name not in self.values:
                continue
            prefix = f"{name}/" if place else ""
            found |= {f"{prefix}{key}": value for key, value in part.statistics(embeddings, labels).items()}
        several = self.values if len(self.parts) > 1 else {}
        return found | {f"term/{name}": value for name, value in several.items()}
