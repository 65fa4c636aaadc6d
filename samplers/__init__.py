"""How batches are composed: batch samplers that know ranks, epochs and state. Needs torch and NumPy only.

Pass one as `batch_sampler=` of a `torch.utils.data.DataLoader`; `state_dict()` then counts what training consumed.
"""

from samplers.groups import IdentityTable, group_by_identity
from samplers.identity_balanced import IdentityBalancedBatchSampler
from samplers.images import ImageBatchSampler
from samplers.look_alikes import LookAlikeBatchSampler
from samplers.pairs import PairBatchSampler

__all__ = [
    "IdentityBalancedBatchSampler",
    "IdentityTable",
    "ImageBatchSampler",
    "LookAlikeBatchSampler",
    "PairBatchSampler",
    "group_by_identity",
]
