"""Miners that choose pairs: positive ones and negative ones, each for itself."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from metricface.choices import is_number
from metricface.distances import Distance, check_distance
from metricface.identities import Identities
from metricface.miners import kernels
from metricface.miners.base import Miner, PairCounts, Sample, check_limit
from metricface.miners.tiles import Tile, tiles
from metricface.tuples import Batch, Pairs


class PairMiner(Miner[Pairs]):
    """A miner of pairs, ordered, anchors ascending; an anchor may have pairs of one kind only."""

    last: PairCounts | None = None

    def __init__(
        self,
        *,
        distance: Distance,
        max_pairs: int | None,
        normalize: bool,
        generator: torch.Generator | None,
        tile_rows: int | None,
    ) -> None:
        super().__init__(normalize=normalize, tile_rows=tile_rows)
        check_distance(distance)
        check_limit("max_pairs", max_pairs)
        self.distance, self.max_pairs, self.generator = distance, max_pairs, generator

    def mine_batch(self, batch: Batch, identities: Identities) -> Pairs:
        """Choose pairs from a checked batch, and count."""
        negative = Sample(self.max_pairs, self.generator)
        pairs = choose_pairs(batch, identities, self.distance, self._rule, negative, tile_rows=self.tile_rows)
        self.last = PairCounts(
            anchors=identities.size.new_full((), len(batch.labels)),
            anchors_without_positive=(identities.positives == 0).sum(),
            anchors_without_negative=(identities.negatives == 0).sum(),
            positive_pairs=identities.positives.sum(),
            negative_pairs=identities.negatives.sum(),
            positives=identities.size.new_full((), len(pairs.positive)),
            negatives=identities.size.new_full((), len(pairs.negative)),
            left_out=identities.size.new_full((), negative.left_out),
        )
        return pairs

    @abstractmethod
    def _rule(self, tile: Tile, sq_negative: Tensor) -> tuple[Tensor, Tensor]:
        """(b, M) bool positives and (b, C) bool negatives of a tile that are chosen."""


def choose_pairs(
    batch: Batch,
    identities: Identities,
    distance: Distance,
    rule: Callable[[Tile, Tensor], tuple[Tensor, Tensor]],
    negative: Sample,
    *,
    tile_rows: int | None = None,
) -> Pairs:
    """The pairs that a rule chooses from each tile and its row of squared distances to negatives.

    negative: where negative pairs are collected, since they may be many.
    """
    positive = Sample(None, None)
    anchors = ((identities.positives > 0) | (identities.negatives > 0)).nonzero()[:, 0]
    for tile in tiles(batch, identities, distance, anchors, tile_rows=tile_rows, whole_rows=True):
        (block,) = tile.blocks()
        is_far, is_near = rule(tile, block.sq_negative)
        row, place = is_far.nonzero(as_tuple=True)
        positive.add(tile.anchors[row], tile.positive[row, place])
        row, column = is_near.nonzero(as_tuple=True)
        negative.add(tile.anchors[row], column)
    empty = batch.self_index[:0]
    return Pairs(*positive.rows(empty, 2), *negative.rows(empty, 2))


def multi_similarity(tile: Tile, sq_negative: Tensor, reach: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(b, M) positives beyond the closest negative, (b, C) negatives within the farthest positive, by `reach` or less.

    reach: squared distances -> the squares of those that lie epsilon beyond. Anchors without a positive or without a
    negative choose nothing.
    """
    if not tile.positive.shape[1]:
        return tile.is_positive, torch.zeros_like(sq_negative, dtype=torch.bool)
    farthest = torch.where(tile.is_positive, tile.sq_positive, -1.0).amax(dim=1, keepdim=True)  # (b, 1)
    upper = torch.where(farthest >= 0, reach(farthest.clamp_min(0.0)), -1.0)
    least = sq_negative.amin(dim=1, keepdim=True)
    return (reach(tile.sq_positive) > least) & tile.is_positive, sq_negative < upper


class PairMarginMiner(PairMiner):
    """Positive pairs farther apart than one threshold, and negative pairs closer than another.

    pos_margin, neg_margin: >= 0, in units of `distance`; a pair at exactly a threshold is not chosen.
    max_pairs: at most so many negative pairs, a uniform sample. normalize: scale rows to length 1 first. generator:
    where draws come from, None for torch's global one. tile_rows: anchors worked on at a time.
    Source: the rule that the contrastive loss implies (Hadsell, Chopra, LeCun 2006): pairs within it have no gradient.
    """

    def __init__(
        self,
        pos_margin: float = 0.2,
        neg_margin: float = 0.8,
        *,
        distance: Distance = "euclidean",
        max_pairs: int | None = None,
        normalize: bool = True,
        generator: torch.Generator | None = None,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(
            distance=distance, max_pairs=max_pairs, normalize=normalize, generator=generator, tile_rows=tile_rows
        )
        for name, value in (("pos_margin", pos_margin), ("neg_margin", neg_margin)):
            if not is_number(value, infinite=True) or value < 0:
                raise ValueError(f"{name} must be a distance, 0 or more; found {value!r}.")
        self.pos_margin, self.neg_margin = pos_margin, neg_margin

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return (
            f"pos_margin={self.pos_margin}, neg_margin={self.neg_margin}, distance={self.distance!r}, "
            f"normalize={self.normalize}"
        )

    def _rule(self, tile: Tile, sq_negative: Tensor) -> tuple[Tensor, Tensor]:
        zero = sq_negative.new_zeros(())
        sq_pos, sq_neg = (
            kernels.sq_reach(zero, margin, self.distance) for margin in (self.pos_margin, self.neg_margin)
        )
        # +inf, where there is no negative, is not below an infinite threshold either.
        return (tile.sq_positive > sq_pos) & tile.is_positive, sq_negative < sq_neg


class MultiSimilarityMiner(PairMiner):
    """Negatives that come closer than the farthest positive, and positives farther than the closest negative.

    epsilon: >= 0, by how much a pair may miss that and still be chosen, in units of `distance`: a negative is taken
    where d_an < max d_ap + epsilon, a positive where d_ap > min d_an - epsilon. Anchors without a positive or without
    a negative have no pairs. distance: the paper's is cosine. max_pairs, normalize, generator, tile_rows: as in
    PairMarginMiner.
    Source: Wang et al. 2019, Multi-Similarity Loss, eq. 6 and 7.
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        *,
        distance: Distance = "cosine",
        max_pairs: int | None = None,
        normalize: bool = True,
        generator: torch.Generator | None = None,
        tile_rows: int | None = None,
    ) -> None:
        super().__init__(
            distance=distance, max_pairs=max_pairs, normalize=normalize, generator=generator, tile_rows=tile_rows
        )
        if not is_number(epsilon) or epsilon < 0:
            raise ValueError(f"epsilon must be finite, 0 or more; found {epsilon!r}.")
        self.epsilon = epsilon

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"epsilon={self.epsilon}, distance={self.distance!r}, normalize={self.normalize}"

    def _rule(self, tile: Tile, sq_negative: Tensor) -> tuple[Tensor, Tensor]:
        return multi_similarity(
            tile, sq_negative, lambda sq_dist: kernels.sq_reach(sq_dist, self.epsilon, self.distance)
        )
