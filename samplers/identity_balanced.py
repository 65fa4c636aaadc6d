"""P identities x K images: the batches that mining needs."""

import logging
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from samplers.identity_batches import IdentityBatchSampler, Labels, Plan, SmallIdentities
from samplers.visits import EvenVisits, IdentityWeights, WeightedVisits

_log = logging.getLogger(__name__)


class IdentityBalancedBatchSampler(IdentityBatchSampler):
    """Batches of P distinct identities with K images each, image indices of one identity side by side.

    An epoch is ceil(usable identities / P) batches. Each usable identity has its visit in it; the last batch is filled
    up from others, with images that their own visit did not take as far as they have such. The n images of an identity
    rotate: counted from epoch 0, epochs fall into cycles of ceil(n / K); its visits of one whole cycle take each image
    at least once, and each cycle has an order of its own. ceil(n / K) epochs that lie across two cycles may miss
    some. The K images of a visit are distinct where n >= K.

    The order depends on (seed, epoch) alone. All ranks share one plan and get P / world_size identities of each batch;
    `world_size` may change on resume. Epochs, state and len(): see EpochBatchSampler.

    labels: (N,) whole numbers or strings, list, array or tensor. identities_per_batch: P, over all ranks together.
    images_per_identity: K.
    small_identities: what to do with identities of fewer than K images. "repeat" takes all their images before any
        a second time: note that an identity with one image then fills K places with it, a positive pair at distance 0;
        a warning says how many do. With many of those use singletons_per_batch. "skip" leaves them out.
    min_images: identities with fewer images have no visits. `left_out_identities` and `left_out_images` say how many
        this or "skip" leaves out, and a warning is logged. Only rank 0 logs.
    singletons_per_batch: N. Above 0 identities with a single image have no visits; N of them, distinct, end every
        batch as negatives, and all of them get their turn over the epochs, K and min_images do not matter to them. The
        ranks' shares of N differ by one at most.
    identity_weights: "uniform" is one visit an epoch for each; "count" is ceil(n / K) visits, so that an epoch shows
        each image at least once (not with `groups`: crossing them comes first), and "sqrt" ceil(sqrt(n / K)). Nobody
        is twice in a batch, so nobody has more visits than an epoch has batches: how far this keeps the long tail from
        its share, `asked_shares` and `realised_shares` say, and a warning how many it holds back. An epoch then is as
        many batches as its visits need, and planning one costs a pass over the identities.
    groups: (N,) a camera, session, age band, ... of each image: the K images of a visit then come from as many
        different ones as possible, so that positives cross groups. `CrossGroupRotation` says in which turns. A warning
        says how many identities have all their images in one group.
    usable_identities: attribute, the identities that have visits.

    Raises ValueError for labels that are empty, not 1-D or neither whole numbers nor strings, P, K or min_images < 1,
    N < 0, a rank out of range, P not divisible by world_size, fewer usable identities than P, fewer singletons
    than N, an unknown small_identities or identity_weights, or another number of groups than labels; TypeError where a
    number is not whole.
    """

    def __init__(
        self,
        labels: Labels,
        identities_per_batch: int,
        images_per_identity: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        small_identities: SmallIdentities = "repeat",
        min_images: int = 1,
        singletons_per_batch: int = 0,
        identity_weights: IdentityWeights = "uniform",
        groups: Labels | None = None,
    ) -> None:
        if identity_weights not in get_args(IdentityWeights):
            raise ValueError(
                f"identity_weights must be one of {', '.join(get_args(IdentityWeights))}; found {identity_weights!r}."
            )
        self.identity_weights: IdentityWeights = identity_weights
        super().__init__(
            labels,
            identities_per_batch,
            images_per_identity,
            {"identity_weights": identity_weights},
            seed=seed,
            rank=rank,
            world_size=world_size,
            small_identities=small_identities,
            min_images=min_images,
            singletons_per_batch=singletons_per_batch,
            groups=groups,
        )

    @property
    def asked_shares(self) -> NDArray[np.float64]:
        """(usable identities,) the share of all visits that the weights ask for: as 1, sqrt(n) or n. Sums to 1."""
        counts = self.table.counts[self._usable].astype(np.float64)
        weights = {"uniform": np.ones_like(counts), "sqrt": np.sqrt(counts), "count": counts}[self.identity_weights]
        shares: NDArray[np.float64] = weights / weights.sum()
        return shares

    @property
    def realised_shares(self) -> NDArray[np.float64]:
        """(usable identities,) the share of an epoch's visits that each has, fillers not counted. Sums to 1."""
        visits = np.ones(self.usable_identities) if isinstance(self._visits, EvenVisits) else self._visits.visits
        shares: NDArray[np.float64] = visits / visits.sum()
        return shares

    def _length(self) -> int:
        number, per_batch = self.usable_identities, self.identities_per_batch
        self._visits: EvenVisits | WeightedVisits = (
            EvenVisits(number, per_batch, self.seed)
            if self.identity_weights == "uniform"
            else WeightedVisits(
                self.table.counts[self._usable], per_batch, self.images_per_identity, self.identity_weights, self.seed
            )
        )
        return self._visits.num_batches

    def _epoch_plan(self, epoch: int) -> Plan:
        planned, slots = self._visits.epoch(epoch), self._part(self.identities_per_batch)
        return lambda batches: planned.at(batches, slots)

    def _warn(self) -> None:
        super()._warn()
        if isinstance(self._visits, WeightedVisits) and self._visits.capped:
            most = int(self._visits.visits.argmax())
            _log.warning(
                'IdentityBalancedBatchSampler has %d identities in every batch, and identity_weights="%s" would have '
                "them more often: the one with most images has %.2f%% of the visits in place of %.2f%%.",
                self._visits.capped,
                self.identity_weights,
                100 * self.realised_shares[most],
                100 * self.asked_shares[most],
            )
