"""Classification heads over raw embeddings, for training with one weight vector per identity: head(embeddings, labels).

The head is dropped after training; only the embedder below it is kept.
"""

from metricface.heads.cosface import CosFace
from metricface.heads.softmax import Softmax

__all__ = ["CosFace", "Softmax"]
