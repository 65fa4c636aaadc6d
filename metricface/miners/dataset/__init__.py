"""Mining over a whole data set with FAISS: who looks like whom, hard images, and the embeddings they come from."""

from metricface.miners.dataset.embedding_file import embed_to_file
from metricface.miners.dataset.hard_images import hard_negatives, hardest_positives
from metricface.miners.dataset.identities import centroids, neighbours_from_centroids, neighbours_from_images
from metricface.miners.dataset.index import EmbeddingIndex

__all__ = [
    "EmbeddingIndex",
    "centroids",
    "embed_to_file",
    "hard_negatives",
    "hardest_positives",
    "neighbours_from_centroids",
    "neighbours_from_images",
]
