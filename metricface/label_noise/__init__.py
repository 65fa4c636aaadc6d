"""Wrong labels and repeated images of a data set: found by embeddings, shown to a person, filtered for training."""
