"""Miners: which pairs and triplets of a batch to train on. Called and exchangeable as pytorch-metric-learning's are."""

from metricface.miners.base import MiningCounts, PairCounts
from metricface.miners.batch_all import BatchAllMiner
from metricface.miners.curriculum import CurriculumMiner
from metricface.miners.fixed_shape import MaskedTriplets
from metricface.miners.in_batch import (
    BatchHardMiner,
    DistanceWeightedMiner,
    EasyPositiveMiner,
    RandomHardMiner,
    RandomMiner,
)
from metricface.miners.memory import EmbeddingMemory
from metricface.miners.pairs import MultiSimilarityMiner, PairMarginMiner
from metricface.miners.semi_hard import SemiHardMiner

__all__ = [
    "BatchAllMiner",
    "BatchHardMiner",
    "CurriculumMiner",
    "DistanceWeightedMiner",
    "EasyPositiveMiner",
    "EmbeddingMemory",
    "MaskedTriplets",
    "MiningCounts",
    "MultiSimilarityMiner",
    "PairCounts",
    "PairMarginMiner",
    "RandomHardMiner",
    "RandomMiner",
    "SemiHardMiner",
]
