"""Sampler, miner and loss of metricface in a training loop of one's own: raw PyTorch and nothing else."""

import torch
from torch.utils.data import DataLoader

from metricface.data.images import Preprocessing, keep
from metricface.data.synthetic import SyntheticFaces
from metricface.losses import TripletLoss
from metricface.miners import BatchHardMiner
from metricface.models import build
from samplers import IdentityBalancedBatchSampler


def main(identities: int = 200, epochs: int = 5) -> list[float]:
    torch.manual_seed(0)
    faces = SyntheticFaces(identities, 8, Preprocessing(48, 48)).in_memory()
    batches = IdentityBalancedBatchSampler(faces.labels, identities_per_batch=16, images_per_identity=4)
    model = build("small", embedding_dim=64, channels=3, height=48, width=48)
    miner, loss = BatchHardMiner(), TripletLoss(margin=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    means = []
    for epoch in range(epochs):
        losses = []
        for images, labels, _ in DataLoader(faces, batch_sampler=batches, collate_fn=keep):
            embeddings = model(faces.preprocessing.to_input(images))
            value = loss(embeddings, labels, miner(embeddings, labels))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch}: mean loss of the hardest triplets {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    main()
