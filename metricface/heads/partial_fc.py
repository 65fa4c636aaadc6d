"""Partial FC: the class matrix of a head spread over ranks, and a sample of the other classes in each step.

    head = PartialFC(ArcFace(num_classes, embedding_dim), sampling_rate=0.1)
    loss = head(embeddings, labels)        # this rank's rows; the loss of all ranks' rows, on every rank

The process group, if there is to be one, must be there before the head is built.
"""

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metricface.choices import is_number
from metricface.distributed import (
    gather,
    gather_plain,
    own_rows,
    raise_on_all_ranks,
    rank,
    row_counts,
    sum_over_ranks,
    world_size,
)
from metricface.heads.base import Head
from metricface.heads.reshard import HELD, check_ranks, rows_of
from metricface.heads.shards import PER_CLASS, Shard, shard_of


class PartialFC(nn.Module):
    """A head whose classes are spread over the ranks, and in training sampled anew in each step.

    head: any of `metricface.heads`, built with the same options on every rank, over all classes (the whole matrix is
    there while it is built). PartialFC takes it over: of weight and bias it keeps the classes of this rank, `shard_of`.
    Margins, scale and other numbers stay attributes of `head`, for a schedule to change; the head itself is not to be
    called. Ranks may have batches of different sizes, or none.

    sampling_rate: the share of a rank's classes that a training step looks at, in (0, 1], also a plain attribute. These
    are the classes of the joined batch, and others at random up to round(rate x classes of the rank), 1 at least; where
    there are more labels than that, the labels alone. The loss is then the head's with those classes only; at 1 it is
    exactly that of the head alone with the joined batch. In eval mode, and without gradients, all classes count.
    seed: of the draws, a whole number of 0 or more. They follow the seed, the first class of the shard, and the buffer
    `step`, which counts training batches: a run resumed from a state_dict draws as it would have.

    Gradients: that of the embeddings is multiplied by the number of ranks, for a network whose gradients
    DistributedDataParallel then averages. Those of weight and bias are whole, and those of further parameters (a
    learned scale) whole and the same on every rank, so PartialFC itself must stay out of DistributedDataParallel.
    They are dense: classes that were not drawn have gradient 0, but an optimizer's momentum and weight decay move them
    all the same, as in the released code, and any torch optimizer works. So what a step does with all classes is
    elementwise, and the products, which are most of its cost, are those of the sample. With 100,000 classes, D = 512,
    B = 128 and SGD with momentum on one CPU thread: 1.27 s a step at rate 1, 0.76 s at 0.3, 0.50 s at 0.1, of which the
    optimizer takes 0.27 s each time.

    `last` is the head's, of the joined batch; accuracy is that among the classes that were looked at.
    Raises ValueError for a rate out of range, fewer classes than ranks, and a rate below 1 with a head that is no
    softmax (SphereFace2, CContrastive, CTriplet, NPT): the sum over some of the other classes, or the nearest of some,
    is another loss.
    Sources: An et al. 2021, Partial FC: Training 10 Million Identities on a Single Machine; An et al. 2022, Killing Two
    Birds with One Stone; insightface's partial_fc_v2.
    """

    seed: Tensor
    step: Tensor
    held: Tensor

    def __init__(self, head: Head, *, sampling_rate: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        _check(head, sampling_rate, seed)
        mine = shard_of(head.num_classes, rank(), world_size())
        self.head = head
        self.sampling_rate = sampling_rate
        self.shard = Shard(mine)
        head.classes = self.shard
        for name in PER_CLASS:
            whole = getattr(head, name, None)
            if whole is not None:
                setattr(head, name, _cut(whole, head.num_classes, mine))
        self.register_buffer("seed", torch.tensor(int(seed)))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer(HELD, torch.tensor([mine.start, mine.stop, head.num_classes]))

    @property
    def last(self) -> dict[str, Tensor] | None:
        """What the head says of the joined batch that it saw last."""
        return self.head.last

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of the joined batch, the mean over the rows of all ranks: a scalar, the same on every rank.

        embeddings: (B_r, D) raw, of this rank; labels: (B_r,) integers in [0, C), C the classes of all ranks. 0 where
        no rank has rows. Raises ValueError as the head does, on every rank where the batch of one is refused.
        """
        losses = self.losses(embeddings, labels)
        return losses.sum() / max(1, len(losses))

    def losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row of all ranks, in rank order, (sum of B_r,): `forward` before the mean."""
        labels = self._checked(embeddings, labels)
        return self._losses(gather(embeddings, averaged=True), gather_plain(labels))

    def of_joined(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """`forward` for a batch that is joined already (`metricface.distributed.gather`), the same on every rank.

        embeddings: (B, D) and labels: (B,) of all ranks. The gradient of the rows is whole on each of them.
        """
        losses = self._losses(embeddings, self._checked(embeddings, labels))
        return losses.sum() / max(1, len(losses))

    def _losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        sample = None
        if self.training and torch.is_grad_enabled():
            sample = self._draw(labels)
            self.step += 1
        with self.shard.read(sample):
            return self.head.losses(embeddings, labels)

    @torch.no_grad()
    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits over all classes, without margin and without gradient: (B_r, D) of this rank -> (B_r, C).

        Every rank must call it, with or without rows. On the way each holds the logits of all ranks' rows.
        """
        self._checked(embeddings, None)
        mine = own_rows(row_counts(embeddings))
        with self.shard.read(None):
            return self.head.logits(gather(embeddings, averaged=False))[mine]

    @torch.no_grad()
    def class_weights_from(self, embeddings: Tensor, labels: Tensor) -> int:
        """As the head's own: each class starts from the mean of its embeddings. Every rank must call it.

        embeddings: (N, D), labels: (N,): those of all classes, or at least all those of the classes this rank holds;
        others are passed over. Returns how many of the C classes have no embedding; their weights stay.
        """
        labels = self._checked(embeddings, labels)
        mine = self._held_here(labels)
        with self.shard.read(None):
            found = self.head._start_from(embeddings[mine], labels[mine] - self.shard.held.start)
        return int(sum_over_ranks((~found).sum()))

    @torch.no_grad()
    def class_vectors(self) -> Tensor:
        """The class vectors of all ranks, (C x K, D), raw, without gradient, on every rank; every rank must call it."""
        return gather_plain(self.head.weight).clone()  # in one process it would be the weight itself

    def _draw(self, labels: Tensor) -> Tensor | None:
        """(S,) the classes that stand for this rank's, counted from its first; None for all. labels: of all ranks."""
        if self.sampling_rate == 1:
            return None
        classes, device = self.shard.held, labels.device
        mixed = np.random.SeedSequence([int(self.seed), classes.start, int(self.step)]).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(mixed[0]))
        positives = labels[self._held_here(labels)] - classes.start
        return sample_classes(positives, len(classes), max(1, round(self.sampling_rate * len(classes))), generator)

    def _held_here(self, labels: Tensor) -> Tensor:
        """(B,) which of them this rank holds."""
        return (labels >= self.shard.held.start) & (labels < self.shard.held.stop)

    def _checked(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """The labels (B_r,) as int64, on the embeddings' device; ValueError on every rank where one finds a fault."""
        if shard_of(self.head.num_classes, rank(), world_size()) != self.shard.held:
            raise ValueError(
                f"This PartialFC was built for classes {self._range()} on rank {rank()}, with another number of ranks "
                f"than now ({world_size()}). Build it after init_process_group; for a state of other ranks see reshard."
            )
        error, found = None, torch.empty(0, dtype=torch.long)
        try:
            self.head._check_embeddings(embeddings)
            if labels is not None:
                found = self.head._check_labels(labels, len(embeddings)).to(embeddings.device)
        except ValueError as problem:
            error = problem
        raise_on_all_ranks(error, self.head.weight.device)
        return found

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *others: Any) -> None:
        """A state of all classes is cut to those of this rank; torch passes a dict that may be changed."""
        held = state_dict.get(f"{prefix}{HELD}")
        if held is not None and held.tolist() != self.held.tolist():
            start, stop, total = held.tolist()
            if (start, stop, total) != (0, self.head.num_classes, self.head.num_classes):
                raise ValueError(
                    f"This state holds classes {start} to {stop - 1} of {total}; this rank holds {self._range()}. "
                    "Pass the states of all ranks through metricface.heads.reshard.reshard first."
                )
            for key in (f"{prefix}head.{name}" for name in PER_CLASS):
                if key in state_dict:
                    state_dict[key] = rows_of(state_dict[key], total, self.shard.held)
            state_dict[f"{prefix}{HELD}"] = self.held
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _range(self) -> str:
        return f"{self.shard.held.start} to {self.shard.held.stop - 1} of {self.head.num_classes}"

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"classes {self._range()}, sampling_rate={self.sampling_rate:g}"


def sample_classes(positives: Tensor, num_classes: int, quota: int, generator: torch.Generator) -> Tensor:
    """Distinct classes, in order: all positives, and others, each as likely, to fill up to the quota.

    positives: (P,) int64 in [0, num_classes), repeats allowed, on the generator's device. Returns int64, `quota` of
    them or as many as there are different positives, if those are more.
    """
    is_positive = torch.zeros(num_classes, dtype=torch.bool, device=positives.device)
    is_positive[positives] = True
    order = torch.randperm(num_classes, generator=generator, device=positives.device)
    positives, negatives = is_positive.nonzero()[:, 0], order[~is_positive[order]]
    return torch.cat([positives, negatives[: max(0, quota - len(positives))]]).sort().values


def _cut(whole: nn.Parameter, num_classes: int, mine: range) -> nn.Parameter:
    return nn.Parameter(rows_of(whole.detach(), num_classes, mine), requires_grad=whole.requires_grad)


def heads_in(module: nn.Module) -> list[Head | PartialFC]:
    """The heads in a module: a PartialFC, not the head inside it."""
    return [
        part
        for part in module.modules()
        if isinstance(part, PartialFC) or (isinstance(part, Head) and not isinstance(part.classes, Shard))
    ]


def _check(head: Head, sampling_rate: float, seed: int) -> None:
    if not isinstance(head, Head):
        raise ValueError(f"PartialFC wraps a head of metricface.heads; got {type(head).__name__}.")
    if isinstance(head.classes, Shard):
        raise ValueError("This head is inside a PartialFC already; build a new one.")
    if not is_number(sampling_rate) or not 0.0 < sampling_rate <= 1.0:
        raise ValueError(f"sampling_rate must lie in (0, 1]; got {sampling_rate!r}.")
    if sampling_rate < 1.0 and not head.is_softmax:
        raise ValueError(
            f"{type(head).__name__} is no softmax: it adds up a term of each other class, or looks for the nearest of "
            f"them, so that with some of the classes it is another loss. Pass sampling_rate=1; got {sampling_rate!r}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be a whole number, 0 or more; got {seed!r}.")
    check_ranks(head.num_classes, world_size())
