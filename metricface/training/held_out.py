"""Scoring a network on people it does not train on: embeddings -> the field's figures and curves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metricface.data.images import ImageSet, UnreadableImageError
from metricface.distances import full_precision, unit_rows
from metricface.distributed import gather_plain, rank, world_size
from metricface.evaluation import retrieval, verification
from metricface.evaluation.pairs import PairList, make_pairs
from metricface.evaluation.verification import VerificationReport
from metricface.modes import evaluating
from metricface.training import ranks
from metricface.training.interrupt import StoppedError, never

BATCH = 256
UNREADABLE_ELSEWHERE = "Another rank could not read an image, and says which."

Figures = dict[str, float | int | None]


@dataclass(frozen=True)
class Scored:
    """The figures of one evaluation, with what plots need: (P,) cosines, (P,) same identity or not, and the curve."""

    figures: Figures
    scores: NDArray[np.float32]
    same: NDArray[np.bool_]
    curve: VerificationReport


class HeldOut:
    """A set of people with the pairs they are scored on, fixed for the whole run.

    Verification pairs are made once by `make_pairs` (at most 20 genuine ones a person), and `listed` pairs, if any,
    are scored beside them under the prefix `listed/`.
    """

    def __init__(self, name: str, images: ImageSet, listed: PairList | None = None, *, seed: int = 0) -> None:
        self.name = name
        self.images = images
        self.pairs = make_pairs(images.labels, seed=seed)
        self.listed = listed

    def score(self, model: nn.Module, device: torch.device, stopped: Callable[[], bool] = never) -> Scored:
        """Embed every image (in evaluation mode, unit length) and compute all figures; ranks share the embedding.

        Raises as `embed` does.
        """
        embeddings = embed(model, self.images, device, shared=True, stopped=stopped)
        return ranks.from_first(self._scored(embeddings) if ranks.speaks() else None)  # type: ignore[return-value]

    def _scored(self, embeddings: NDArray[np.float32]) -> Scored:
        scores, report = _verify(embeddings, self.pairs)
        figures = _named(report, "")
        ranked = retrieval.evaluate(embeddings, self.images.labels)
        figures |= {
            "recall_at_1": ranked.recall_at_1,
            "map_at_r": ranked.map_at_r,
            "people": len(self.images.identities),
            "images": len(self.images),
            "queries": ranked.queries,
            "query_people": ranked.identities,
            "genuine_people": len(np.unique(np.asarray(self.images.labels)[self.pairs.first[self.pairs.same]])),
        }
        if self.listed is not None:
            figures |= _named(_verify(embeddings, self.listed)[1], "listed/")
            named = np.unique(np.concatenate([self.listed.first, self.listed.second]))
            figures["listed/images"] = len(named)
            figures["listed/people"] = len(np.unique(np.asarray(self.images.labels)[named]))
            figures["listed/missing_pairs"] = self.listed.missing
        return Scored(figures, scores, self.pairs.same, report)


def embed(
    model: nn.Module,
    images: ImageSet,
    device: torch.device,
    *,
    unit: bool = True,
    shared: bool = False,
    stopped: Callable[[], bool] = never,
) -> NDArray[np.float32]:
    """Embeddings (N, D) of a set, in its order, of unit length or raw; every module gets its mode back afterwards.

    shared: each rank embeds its part, and all get the whole; every rank must call it then. stopped: asked between two
    batches.
    Raises StoppedError where it says so, UnreadableImageError, and ValueError, with their number, where embeddings are
    not finite; where ranks share the work, all of them raise what one does.
    """
    if shared:
        embeddings = _shared(model, images, device, unit, stopped)
    else:
        embeddings = _embed(model, images, range(len(images)), device, unit, stopped)
    broken = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(embeddings)} embeddings are not finite; the network has diverged.")
    return embeddings.numpy()


def _shared(
    model: nn.Module, images: ImageSet, device: torch.device, unit: bool, stopped: Callable[[], bool]
) -> torch.Tensor:
    own = range(len(images) * rank() // world_size(), len(images) * (rank() + 1) // world_size())
    embeddings, failed = None, None
    try:
        embeddings = _embed(model, images, own, device, unit, stopped)
    except (StoppedError, UnreadableImageError) as error:
        failed = error
    ranks.raise_together(failed, UnreadableImageError, UNREADABLE_ELSEWHERE)
    ranks.raise_together(failed, StoppedError, "Another rank was asked to stop.")
    assert embeddings is not None
    return gather_plain(embeddings)


def _embed(
    model: nn.Module, images: ImageSet, own: range, device: torch.device, unit: bool, stopped: Callable[[], bool]
) -> torch.Tensor:
    prepare = unit_rows if unit else full_precision
    parts: list[torch.Tensor] = []
    with evaluating(model), torch.inference_mode():
        for batch in _batches(images, own):
            if parts and stopped():
                raise StoppedError
            parts.append(prepare(model(batch.to(device))).cpu())
        if not parts:  # of very few images, a rank has none; it still has a width
            parts = [prepare(model(_inputs(images, range(1)).to(device))).cpu()[:0]]
    return torch.cat(parts)


def _batches(images: ImageSet, own: range) -> Iterator[torch.Tensor]:
    for start in range(0, len(own), BATCH):
        yield _inputs(images, own[start : start + BATCH])


def _inputs(images: ImageSet, indices: range) -> torch.Tensor:
    return images.preprocessing.to_input(images.__getitems__(list(indices)).images)


def _verify(embeddings: NDArray[np.float32], pairs: PairList) -> tuple[NDArray[np.float32], VerificationReport]:
    scores = np.einsum("pd,pd->p", embeddings[pairs.first], embeddings[pairs.second])
    return scores, verification.evaluate(scores, pairs.same, fold=pairs.fold)


def _named(report: VerificationReport, prefix: str) -> Figures:
    figures: Figures = {
        "accuracy": report.accuracy,
        "accuracy_se": report.accuracy_se,
        "threshold": report.threshold,
        "auc": report.auc,
        "eer": report.eer,
        "accuracy_folds": len(report.fold_accuracies),
        "accuracy_genuine_pairs": report.accuracy_genuine,
        "accuracy_impostor_pairs": report.accuracy_impostors,
        "genuine_pairs": report.genuine,
        "impostor_pairs": report.impostors,
    }
    for point in report.tar_at_far:
        far = f"{point.far:.0e}".replace("e-0", "e-")
        figures |= {f"tar_at_far_{far}": point.tar, f"threshold_at_far_{far}": point.threshold}
    return {f"{prefix}{name}": value for name, value in figures.items()}
