"""Pair and triplet losses, called as pytorch-metric-learning's are: loss(embeddings, labels, indices_tuple=None, ...).

Each module also holds its loss as a plain function of distances, unreduced. Without a tuple a loss runs over every pair
or triplet, none of them listed; `metricface.losses.mined` has losses that choose among them in the same pass.

Of pytorch-metric-learning's wrappers, MultipleLosses takes these losses; CrossBatchMemory and SelfSupervisedLoss know
their own losses by class name and refuse all but ContrastiveLoss. For a memory of earlier batches pass its rows to
miner and loss as ref_emb and ref_labels.
"""

from metricface.losses.contrastive import ContrastiveLoss
from metricface.losses.margin_based import MarginBasedLoss
from metricface.losses.triplet import TripletLoss

__all__ = ["ContrastiveLoss", "MarginBasedLoss", "TripletLoss"]
