"""Which pairs and triplets of a batch to learn from. Miners are called as pytorch-metric-learning's are."""

from metricface.miners.in_batch import BatchHardMiner, DistanceWeightedMiner, MiningCounts, RandomMiner, SemiHardMiner

__all__ = ["BatchHardMiner", "DistanceWeightedMiner", "MiningCounts", "RandomMiner", "SemiHardMiner"]
