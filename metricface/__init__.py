"""Train identity embeddings by mining pairs and triplets: faces first, any identity-labelled images as well."""

from metricface.models.embedder import Embedder, load

__version__ = "0.1.0"
__all__ = ["Embedder", "load"]
