"""Pair and triplet losses, called as pytorch-metric-learning's are: loss(embeddings, labels, indices_tuple=None, ...).

Each module also holds its loss as a plain function of distances, unreduced.
"""

from metricface.losses.contrastive import ContrastiveLoss
from metricface.losses.margin_based import MarginBasedLoss
from metricface.losses.triplet import TripletLoss

__all__ = ["ContrastiveLoss", "MarginBasedLoss", "TripletLoss"]
