"""Pair, triplet and centre losses, called as PML's are: loss(embeddings, labels, indices_tuple=None, ...).

PML is pytorch-metric-learning. Each module also holds its loss as a plain function, unreduced. Without a tuple a loss
runs over every pair or triplet, none of them listed; `metricface.losses.mined` has losses that choose among them in the
same pass. Centre losses look at each embedding, and stand beside a head or another loss.

Of PML's wrappers, MultipleLosses takes these losses; CrossBatchMemory and SelfSupervisedLoss go by class names: they
take those that they have themselves (contrastive, both lifted structure losses, multi-similarity, circle, angular) and
refuse the others. For a memory of earlier batches pass its rows to miner and loss as ref_emb and ref_labels.
"""

from metricface.losses.angular import AngularLoss
from metricface.losses.center import CenterLoss
from metricface.losses.circle import CircleLoss
from metricface.losses.contrastive import ContrastiveLoss
from metricface.losses.contrastive_center import ContrastiveCenterLoss
from metricface.losses.deepid2 import DeepID2Loss
from metricface.losses.lifted import GeneralizedLiftedStructureLoss, LiftedStructureLoss
from metricface.losses.margin_based import MarginBasedLoss
from metricface.losses.multi_similarity import MultiSimilarityLoss
from metricface.losses.n_pair import NPairLoss
from metricface.losses.range_loss import RangeLoss
from metricface.losses.triplet import TripletLoss

__all__ = [
    "AngularLoss",
    "CenterLoss",
    "CircleLoss",
    "ContrastiveCenterLoss",
    "ContrastiveLoss",
    "DeepID2Loss",
    "GeneralizedLiftedStructureLoss",
    "LiftedStructureLoss",
    "MarginBasedLoss",
    "MultiSimilarityLoss",
    "NPairLoss",
    "RangeLoss",
    "TripletLoss",
]
