"""Every triplet of a batch, or a uniform sample of them."""

import torch
from torch import Tensor

from metricface.identities import Identities, negative_of, positive_pairs
from metricface.miners.base import Chosen, TripletMiner, check_limit
from metricface.tuples import Batch, Triplets


class BatchAllMiner(TripletMiner):
    """Every triplet: each ordered positive pair with each negative of its anchor. Distances play no part.

    A batch of P identities x K images has PK (K - 1)(PK - K) of them, 200 million at 2,048 x 4, and a list takes 24
    bytes each; metricface.losses.mined.BatchAllTripletLoss needs no list.
    max_triplets: at most so many, a uniform sample without replacement, drawn in memory that grows with the sample.
    generator: where draws come from, None for torch's global one.
    Source: Hermans, Beyer and Leibe 2017, In Defense of the Triplet Loss, section 2 ("batch all").
    """

    def __init__(self, *, max_triplets: int | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(normalize=False)
        check_limit("max_triplets", max_triplets)
        self.max_triplets, self.generator = max_triplets, generator

    def extra_repr(self) -> str:
        """Settings, as in the constructor."""
        return f"max_triplets={self.max_triplets}"

    def _choose(self, batch: Batch, identities: Identities) -> Chosen:
        anchor, positive = positive_pairs(batch, identities)
        negatives = identities.negatives[anchor]  # (P,)
        last = negatives.cumsum(0)
        total = int(last[-1]) if len(last) else 0
        number = self._numbers(total, batch.labels.device)  # triplets counted pair after pair
        pair = torch.searchsorted(last, number, right=True)
        rank = number - (last - negatives)[pair]
        anchor, positive = anchor[pair], positive[pair]
        triplets = Triplets(anchor, positive, negative_of(identities, anchor, rank))
        return Chosen(triplets, identities.positives.sum(), (negatives == 0).sum(), total - len(number))

    def _numbers(self, total: int, device: torch.device) -> Tensor:
        """Numbers below `total`, ascending: all, or as many different ones as the limit says."""
        wanted = total if self.max_triplets is None else min(total, self.max_triplets)
        if wanted == total:
            return torch.arange(total, device=device)
        drawn_on = device if self.generator is None else self.generator.device
        if 2 * wanted > total:
            return torch.randperm(total, device=drawn_on, generator=self.generator)[:wanted].sort().values.to(device)
        found = torch.empty(0, dtype=torch.long, device=drawn_on)
        while len(found) < wanted:
            more = torch.randint(
                total, (wanted - len(found) + wanted // 8 + 8,), device=drawn_on, generator=self.generator
            )
            found = torch.unique(torch.cat([found, more]))
        kept = torch.randperm(len(found), device=drawn_on, generator=self.generator)[:wanted]
        return found[kept.sort().values].to(device)
