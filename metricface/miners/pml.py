"""pytorch-metric-learning's miners by name, argument and base class, on our kernels: change one import line.

    from metricface.miners.pml import BatchHardMiner  # was: from pytorch_metric_learning.miners

They take PML's LpDistance (p = 2, power 1 or 2), CosineSimilarity and DotProductSimilarity, return PML's tuples, and
are its BaseMiners, statistics and all; they need no B x B matrix and no list of all triplets. What differs, on purpose:

- DistanceWeightedMiner takes each ordered positive pair once, and weighs negatives row by row: PML's draws positives
  with replacement, and one near-duplicate among the negatives leaves nearly all other anchors without a triplet.
- `type_of_triplets` that PML does not know is an error; PML takes it for "all".
- forward also takes `self_index`, which reference is the anchor itself. Without it the references are taken for the
  batch where ref_labels is the very object labels, as in PML, or ref_emb the very object embeddings (in PML: for
  MultiSimilarityMiner only, and there ref_labels does not matter).
- Pairs and triplets come in the order of their indices; half-precision embeddings are compared in float32; labels must
  be integers.
- Unnormalised dot products in float32 are rounded in proportion to the longest reference's squared length.
- DistanceWeightedMiner refuses cutoffs that mean nothing (0, or not below nonzero_loss_cutoff). Statistics are those of
  the miners; the distance object's own are not taken.
"""

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor
from torch.nn import functional as F

from metricface.choices import check_choice
from metricface.distances import Distance, full_precision
from metricface.identities import Identities, find_identities
from metricface.miners import in_batch, kernels
from metricface.miners.base import Sample
from metricface.miners.pairs import choose_pairs, multi_similarity
from metricface.miners.tiles import Tile, tiles
from metricface.tuples import Batch, check_batch

TRIPLET_TYPES = ("all", "hard", "semihard", "easy")


class _Space(NamedTuple):
    """A batch whose squared Euclidean distances are ordered as PML's matrix, and how to translate between the two."""

    batch: Batch
    identities: Identities
    unit: Distance  # in which margins between two entries of PML's matrix are squared distances
    offset: Tensor | None  # (B,) of similarities: squared distance = offset - 2 x similarity

    def tiles(self, anchors: Tensor | None = None) -> Any:
        """Tiles of whole rows."""
        return tiles(self.batch, self.identities, "squared_euclidean", anchors, whole_rows=True)

    def reach(self, sq_dist: Tensor, margin: float) -> Tensor:
        """Squared distance `margin` beyond: more distance, or less similarity. -1 where that is less than nothing."""
        if self.unit == "euclidean" and margin:  # the square of a root is not always the number itself
            dist = sq_dist.sqrt() + margin
            return torch.where(dist >= 0, dist.square(), -1.0)
        return kernels.sq_reach(sq_dist, margin, self.unit)

    def sq_dist(self, value: float, anchors: Tensor) -> Tensor:
        """(b, 1) squared distances that belong to an entry of PML's matrix."""
        if self.offset is not None:
            return (self.offset[anchors] - 2.0 * value)[:, None]
        sq_dist = value if self.unit == "squared_euclidean" else value * abs(value)
        return self.batch.embeddings.new_full((len(anchors), 1), sq_dist)

    def value(self, sq_dist: Tensor, anchors: Tensor) -> Tensor:
        """Entries of PML's matrix: (b, m) squared distances of anchors (b,)."""
        if self.offset is not None:
            return 0.5 * (self.offset[anchors, None] - sq_dist)
        return sq_dist if self.unit == "squared_euclidean" else sq_dist.sqrt()


class _OnOurKernels(pml_miners.BaseMiner):  # type: ignore[misc]
    """Translates a PML miner's distance into squared Euclidean distances."""

    _self_index: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _unit(self.distance)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
    ) -> Any:
        """PML's tuple: int64 anchors, positives, negatives (T,), or two index pairs.

        embeddings: (B, D); labels: (B,); ref_emb (R, D), ref_labels (R,), or neither. self_index: (B,) which reference
        is the anchor itself, -1 for none. Raises ValueError for wrong shapes, types and ranges, NaN and infinity.
        """
        self._self_index = self_index
        try:
            return super().forward(embeddings, labels, ref_emb, ref_labels)
        finally:
            self._self_index = None

    def _space(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> _Space:
        itself = self._self_index
        if itself is None and (ref_labels is labels or ref_emb is embeddings):
            itself = torch.arange(len(labels), device=embeddings.device)
        unit = _unit(self.distance)
        x, y = full_precision(embeddings), full_precision(ref_emb)
        if self.distance.normalize_embeddings:
            x, y = F.normalize(x), F.normalize(y)
        offset = None
        if unit == "cosine":
            # One more dimension gives all references one length; then |x - y|^2 = |x|^2 + length^2 - 2 xy.
            sq_norms = y.square().sum(dim=1)
            sq_length = sq_norms.max() if len(y) else sq_norms.new_zeros(())
            x = F.pad(x, (0, 1))
            y = torch.cat([y, (sq_length - sq_norms).clamp_min(0.0).sqrt()[:, None]], dim=1)
            offset = x.square().sum(dim=1) + sq_length
        batch = check_batch(x, labels, y, ref_labels, itself)
        return _Space(batch, find_identities(batch), unit, offset)


def _unit(distance: Any) -> Distance:
    """What PML's distance is here; ValueError where it is none of ours."""
    if type(distance) in (pml_distances.CosineSimilarity, pml_distances.DotProductSimilarity):
        if distance.p == 2 and distance.power == 1:
            return "cosine"
    elif type(distance) is pml_distances.LpDistance and distance.p == 2 and distance.power in (1, 2):
        return "euclidean" if distance.power == 1 else "squared_euclidean"
    raise ValueError(
        f"metricface.miners.pml takes LpDistance (p=2, power 1 or 2), CosineSimilarity and DotProductSimilarity "
        f"(p=2, power 1); found {type(distance).__name__} with p={distance.p}, power={distance.power}. "
        "Use pytorch_metric_learning's own miner for it."
    )


class BatchEasyHardMiner(_OnOurKernels, pml_miners.BatchEasyHardMiner):  # type: ignore[misc]
    """One positive and one negative an anchor, or all of a kind: PML's arguments, result and statistics.

    pos_strategy, neg_strategy: "easy", "hard", "semihard" (the hardest positive closer than the chosen negative; the
    hardest negative farther than the chosen positive) or "all". allowed_pos_range, allowed_neg_range: (least, most)
    entries of the distance's matrix. distance: see the module. Returns (a, p, a, n). Ties take the lowest index.
    Raises ValueError for strategies PML refuses.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Called by forward."""
        space = self._space(embeddings, labels, ref_emb, ref_labels)
        every_p, every_n = self.pos_strategy == self.ALL, self.neg_strategy == self.ALL
        positives, negatives = Sample(None, None), Sample(None, None)
        p_values: list[Tensor] = []
        n_values: list[Tensor] = []
        identities = space.identities
        anchors = ((identities.positives > 0) | (identities.negatives > 0)).nonzero()[:, 0]
        for tile in space.tiles(anchors):
            (block,) = tile.blocks()
            near = self._allowed(space, tile, tile.sq_positive, tile.is_positive, self.allowed_pos_range)
            far = self._allowed(space, tile, block.sq_negative, block.sq_negative < torch.inf, self.allowed_neg_range)
            p_place, n_place, has_p, has_n = self._chosen(tile.sq_positive, near, block.sq_negative, far)
            kept_p, kept_n = (has_p, has_n) if every_p or every_n else (has_p & has_n, has_p & has_n)
            wanted_p = tile.is_positive if every_p else _one_hot(p_place, kept_p, near)
            wanted_n = (block.sq_negative < torch.inf) if every_n else _one_hot(n_place, kept_n, far)
            for wanted, sample, columns, sq_dist, values in (
                (wanted_p, positives, tile.positive, tile.sq_positive, p_values),
                (wanted_n, negatives, None, block.sq_negative, n_values),
            ):
                row, place = wanted.nonzero(as_tuple=True)
                sample.add(tile.anchors[row], place if columns is None else columns[row, place])
                values.append(space.value(sq_dist[row, place][:, None], tile.anchors[row])[:, 0])
        empty = labels.new_empty(0, dtype=torch.long)
        none = space.batch.embeddings.new_empty(0)
        self.set_stats(torch.cat([none, *p_values]), torch.cat([none, *n_values]))
        return (*positives.rows(empty, 2), *negatives.rows(empty, 2))

    def _allowed(
        self, space: _Space, tile: Tile, sq_dist: Tensor, counted: Tensor, allowed: tuple[float, float] | None
    ) -> Tensor:
        if allowed is None:
            return counted
        ends = [space.sq_dist(value, tile.anchors) for value in allowed]
        low, high = ends if space.offset is None else ends[::-1]
        return counted & (sq_dist >= low) & (sq_dist <= high)

    def _chosen(
        self, sq_positive: Tensor, near: Tensor, sq_negative: Tensor, far: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(b,) places of positive and negative, and whether there are any."""
        hardest_p, farthest_n = self.pos_strategy != self.EASY, self.neg_strategy == self.EASY
        if self.pos_strategy == self.SEMIHARD:
            n_place, has_n = _extreme(sq_negative, far, most=farthest_n)
            limit = sq_negative.gather(1, n_place[:, None])
            p_place, has_p = _extreme(sq_positive, near & (sq_positive < limit), most=True)
            return p_place, n_place, has_p, has_n
        p_place, has_p = _extreme(sq_positive, near, most=hardest_p)
        if self.neg_strategy == self.SEMIHARD and sq_positive.shape[1]:
            far = far & (sq_negative > sq_positive.gather(1, p_place[:, None]))
        n_place, has_n = _extreme(sq_negative, far, most=farthest_n)
        return p_place, n_place, has_p, has_n


def _extreme(sq_dist: Tensor, allowed: Tensor, *, most: bool) -> tuple[Tensor, Tensor]:
    """(b,) place of each row's largest or smallest allowed number, and whether any is allowed."""
    if not sq_dist.shape[1]:
        return sq_dist.new_zeros(len(sq_dist), dtype=torch.long), allowed.any(dim=1)
    choose = kernels.farthest if most else kernels.closest
    return choose(sq_dist, allowed), allowed.any(dim=1)


def _one_hot(place: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """(b, m) bool: the place of each row that is kept."""
    chosen = torch.zeros_like(like)
    return chosen.scatter_(1, place[:, None], kept[:, None]) if like.shape[1] else chosen


class BatchHardMiner(BatchEasyHardMiner, pml_miners.BatchHardMiner):  # type: ignore[misc]
    """The farthest positive and the closest negative of each anchor: PML's BatchHardMiner. Returns (a, p, n)."""

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Called by forward."""
        anchor, positive, _, negative = super().mine(embeddings, labels, ref_emb, ref_labels)
        return anchor, positive, negative


class TripletMarginMiner(_OnOurKernels, pml_miners.TripletMarginMiner):  # type: ignore[misc]
    """Every triplet of a type: PML's arguments, result and statistics.

    type_of_triplets: "all", d_an - d_ap <= margin; "hard", those with d_an <= d_ap; "semihard", those with d_an > d_ap;
    "easy", d_an - d_ap > margin. (For a similarity the other way about.) margin: in the distance's own units.
    Returns (a, p, n). Raises ValueError for any other type, which PML takes for "all". Memory is that of the result.
    """

    def __init__(self, margin: float = 0.2, type_of_triplets: str = "all", **kwargs: Any) -> None:
        check_choice("type_of_triplets", type_of_triplets, TRIPLET_TYPES)
        super().__init__(margin=margin, type_of_triplets=type_of_triplets, **kwargs)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Called by forward."""
        space = self._space(embeddings, labels, ref_emb, ref_labels)
        sample = Sample(None, None)
        d_ap, d_an, number = 0.0, 0.0, 0
        for tile in space.tiles():
            (block,) = tile.blocks()
            upper = space.reach(tile.sq_positive, self.margin)
            for j, rows in enumerate(tile.depths):
                inside = self._inside(block.sq_negative[:rows], tile.sq_positive[:rows, j, None], upper[:rows, j, None])
                row, column = (inside & tile.is_positive[:rows, j, None]).nonzero(as_tuple=True)
                sample.add(tile.anchors[row], tile.positive[row, j], column)
            if self.collect_stats:
                of_tile = self._sums(space, tile, block.sq_negative)
                d_ap, d_an, number = d_ap + of_tile[0], d_an + of_tile[1], number + of_tile[2]
        if self.collect_stats:
            of_each = [
                torch.tensor(value / number if number else torch.nan, dtype=torch.float64) for value in (d_ap, d_an)
            ]
            gap = of_each[0] - of_each[1] if self.distance.is_inverted else of_each[1] - of_each[0]
            self.set_stats(*of_each, gap)
        return tuple(sample.rows(labels.new_empty(0, dtype=torch.long), 3))

    def _inside(self, sq_negative: Tensor, sq_positive: Tensor, upper: Tensor) -> Tensor:
        if self.type_of_triplets == "easy":
            return (sq_negative > upper) & (sq_negative < torch.inf)
        within = (sq_negative <= upper) & (sq_negative < torch.inf)
        if self.type_of_triplets == "hard":
            return within & (sq_negative <= sq_positive)
        return within & (sq_negative > sq_positive) if self.type_of_triplets == "semihard" else within

    def _sums(self, space: _Space, tile: Tile, sq_negative: Tensor) -> tuple[float, float, int]:
        """Sums of d_ap and d_an over all triplets of a tile, and how many there are."""
        is_negative = sq_negative < torch.inf
        positives, negatives = tile.is_positive.sum(dim=1), is_negative.sum(dim=1)
        d_ap = torch.where(tile.is_positive, space.value(tile.sq_positive, tile.anchors), 0.0).sum(dim=1)
        d_an = torch.where(is_negative, space.value(sq_negative, tile.anchors), 0.0).sum(dim=1)
        return float((d_ap * negatives).sum()), float((d_an * positives).sum()), int((positives * negatives).sum())


class DistanceWeightedMiner(_OnOurKernels, pml_miners.DistanceWeightedMiner):  # type: ignore[misc]
    """Each ordered positive pair once, with a negative drawn by distance: PML's arguments. Returns (a, p, n).

    cutoff, nonzero_loss_cutoff: as in metricface.miners.DistanceWeightedMiner, which this is. See the module for what
    differs from PML's. Draws come from torch's global generator. Raises ValueError for cutoffs that mean nothing.
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, **kwargs: Any) -> None:
        super().__init__(cutoff=cutoff, nonzero_loss_cutoff=nonzero_loss_cutoff, **kwargs)
        in_batch.DistanceWeightedMiner(cutoff=self.cutoff, nonzero_loss_cutoff=self.nonzero_loss_cutoff)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Called by forward."""
        space = self._space(embeddings, labels, ref_emb, ref_labels)
        miner = in_batch.DistanceWeightedMiner(cutoff=self.cutoff, nonzero_loss_cutoff=self.nonzero_loss_cutoff)
        return tuple(miner.mine_batch(space.batch, space.identities))


class MultiSimilarityMiner(_OnOurKernels, pml_miners.MultiSimilarityMiner):  # type: ignore[misc]
    """Negatives within the farthest positive and positives beyond the closest negative, by `epsilon`: PML's arguments.

    epsilon: in the distance's own units; the distance is cosine similarity by default. Returns (a, p, a, n).
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Called by forward."""
        space = self._space(embeddings, labels, ref_emb, ref_labels)

        def rule(tile: Tile, sq_negative: Tensor) -> tuple[Tensor, Tensor]:
            return multi_similarity(tile, sq_negative, lambda sq_dist: space.reach(sq_dist, self.epsilon))

        return tuple(choose_pairs(space.batch, space.identities, "squared_euclidean", rule, Sample(None, None)))


class PairMarginMiner(_OnOurKernels, pml_miners.PairMarginMiner):  # type: ignore[misc]
    """Positive pairs farther than `pos_margin` and negative pairs closer than `neg_margin`: PML's arguments.

    Both in the distance's own units; for a similarity positives below and negatives above. Returns (a, p, a, n).
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
        """Called by forward."""
        space = self._space(embeddings, labels, ref_emb, ref_labels)
        values: tuple[list[Tensor], list[Tensor]] = ([], [])

        def rule(tile: Tile, sq_negative: Tensor) -> tuple[Tensor, Tensor]:
            is_negative = sq_negative < torch.inf
            if self.collect_stats:
                for sq_dist, counted, found in (
                    (tile.sq_positive, tile.is_positive, values[0]),
                    (sq_negative, is_negative, values[1]),
                ):
                    found.append(space.value(sq_dist, tile.anchors)[counted])
            far = tile.sq_positive > space.sq_dist(self.pos_margin, tile.anchors)
            near = sq_negative < space.sq_dist(self.neg_margin, tile.anchors)
            return far & tile.is_positive, near & is_negative

        pairs = choose_pairs(space.batch, space.identities, "squared_euclidean", rule, Sample(None, None))
        if self.collect_stats:
            none = space.batch.embeddings.new_empty(0)
            self.set_stats(*(torch.cat([none, *found]) for found in values))
        return tuple(pairs)
