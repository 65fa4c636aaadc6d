"""Margins on the angle: ArcFace, the combined margin, and ArcFace with several vectors for a class."""

import torch
from torch import Tensor

from metricface.choices import is_count
from metricface.distances import unit_rows
from metricface.heads.base import check_number, cross_entropy, fitting
from metricface.heads.cosine import CosineHead
from metricface.heads.target import (
    BeyondPi,
    Target,
    angle,
    check_beyond_pi,
    shifted_by_rule,
    with_slope,
)

PI = torch.pi


class ArcFace(CosineHead):
    """Cross-entropy over scale * cos(theta_j), the target class's being scale * cos(theta_y + margin_rad).

    Embeddings and class weights are both scaled to length 1; no bias. Reduction: mean over the batch.
    margin_rad: 0.5 in the paper, in radians; scale: 64. Both are plain attributes that a schedule may change.
    beyond_pi, where theta + m > pi and the cosine would rise again: "monotone": cos(theta) - m sin(m) there (PML,
    face.evoLVe; it jumps from -1 to cos(pi - m) - m sin(m)); "easy": the margin only where cos(theta) > 0, cos(theta)
    elsewhere; "none": as it is (the released training code).
    detach_margin: the gradient passes the margin by, as in insightface's PyTorch code: scale with respect to
    cos(theta), not scale * sin(theta + m) / sin(theta). Same value. At angles of 0 and pi the margin's part of the
    gradient is 0. streaming, generator, `last`: as in Head.

    pytorch-metric-learning's ArcFaceLoss is beyond_pi="monotone" with the margin in degrees, on clamped cosines through
    an arc cosine: below 0.03 degrees its gradient is 0, and in bfloat16 it is not finite at small angles.
    Source: Deng et al. 2019, ArcFace, eq. 3.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin_rad: float = 0.5,
        scale: float = 64.0,
        beyond_pi: BeyondPi = "monotone",
        detach_margin: bool = False,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("margin_rad", margin_rad, 0.0, PI)
        check_beyond_pi(beyond_pi)
        self.margin_rad = margin_rad
        self.beyond_pi = beyond_pi
        self.detach_margin = detach_margin

    def target_cos(self, target: Target) -> Tensor:
        """cos(theta + margin_rad), by the rule `beyond_pi`: (B,)."""
        moved = shifted_by_rule(target, self.margin_rad, self.beyond_pi)
        return with_slope(moved, 1.0, target.cos) if self.detach_margin else moved

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        detach = ", detach_margin=True" if self.detach_margin else ""
        return f"{super().extra_repr()}, margin_rad={self.margin_rad}, beyond_pi={self.beyond_pi!r}{detach}"


class CombinedMargin(CosineHead):
    """Cross-entropy over scale * cos(theta_j), the target class's being scale * (cos(m1 theta + m2) - m3).

    Embeddings and class weights are both scaled to length 1; no bias. Reduction: mean over the batch.
    m1: factor of the angle, above 0 (SphereFace's); m2: added to it, in radians (ArcFace's); m3: subtracted from the
    cosine (CosFace's). The paper's pairs are (1, 0.3, 0.2) and (0.9, 0.4, 0.15). Plain attributes that a schedule may
    change. Where m1 theta + m2 > pi the cosine rises again: nothing is done about it, as in the released code. At
    angles of 0 and pi the margin's part of the gradient is 0. streaming, generator, `last`: as in Head.

    insightface's PyTorch CombinedMarginLoss drops m2 where m3 > 0 (it is then CosFace) and fails for m1 != 1.
    pytorch-metric-learning has none. Source: Deng et al. 2019, ArcFace, eq. 4.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        scale: float = 64.0,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, embedding_dim, scale=scale, streaming=streaming, generator=generator)
        check_number("m1", m1, 0.0, 10.0, least_too=False)
        check_number("m2", m2, 0.0, PI)
        check_number("m3", m3, 0.0, 2.0)
        self.m1, self.m2, self.m3 = m1, m2, m3

    def target_cos(self, target: Target) -> Tensor:
        """cos(m1 theta + m2) - m3: (B,)."""
        return torch.cos(self.m1 * angle(target) + self.m2) - self.m3

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, m1={self.m1}, m2={self.m2}, m3={self.m3}"


class SubCenterArcFace(ArcFace):
    """ArcFace with K vectors for each class: the cosine of a class is that of its nearest vector.

    For noisy labels: most images of a class gather around one vector, and wrong ones around the others. weight:
    (C x K, D), the K vectors of a class one after the other. sub_centers: K, 3 in the paper. margin_rad, scale,
    beyond_pi, detach_margin, streaming, generator, `last`: as in ArcFace. Reduction: mean over the batch. After
    training the authors drop images further than 75 degrees from their class's dominant vector and train again with
    K = 1. class_weights_from gives each vector of a class the mean of every K-th image of it, or of all of them
    where there is none.
    pytorch-metric-learning's SubCenterArcFaceLoss is the same with K columns beside each other and degrees.
    Source: Deng et al. 2020, Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces, eq. 3.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        sub_centers: int = 3,
        margin_rad: float = 0.5,
        scale: float = 64.0,
        beyond_pi: BeyondPi = "monotone",
        detach_margin: bool = False,
        streaming: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not is_count(sub_centers):
            raise ValueError(f"sub_centers must be a whole number, at least 1; got {sub_centers!r}.")
        self.vectors_per_class = int(sub_centers)  # before the matrix is made
        super().__init__(
            num_classes,
            embedding_dim,
            margin_rad=margin_rad,
            scale=scale,
            beyond_pi=beyond_pi,
            detach_margin=detach_margin,
            streaming=streaming,
            generator=generator,
        )

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            rows = self._nearest(x, labels)
        queries = self._queries(x)
        others = self._others(
            queries, labels, rows=rows, transform=lambda products, own: self._grouped(products).amax(dim=2)
        )
        target = self._target(others.own / self.scale, x, rows)
        return cross_entropy(others.reduced, self.scale * self.target_cos(target))

    @torch.no_grad()
    def nearest_sub_center(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D), (B,) -> (B,) int64 rows of `weight`: of the K vectors of its class the nearest to each embedding.

        Raises ValueError as `forward` does.
        """
        self._check_embeddings(embeddings)
        return self._nearest(embeddings, self._check_labels(labels, len(embeddings)).to(embeddings.device))

    def _nearest(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        z = unit_rows(self._prepare(embeddings))
        first = labels * self.vectors_per_class
        vectors = (self.classes.vectors(self, first + k) for k in range(self.vectors_per_class))
        products = [(z * unit_rows(some)).sum(dim=1) for some in vectors]
        return first + torch.stack(products).argmax(dim=0)

    def _set_classes(self, means: Tensor, found: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        order = labels.argsort(stable=True)
        ordered = labels[order]
        within = torch.arange(len(ordered), device=ordered.device) - torch.searchsorted(ordered, ordered)
        for k in range(self.vectors_per_class):
            mine = order[within % self.vectors_per_class == k]
            some, has = self._class_means(embeddings[mine.to(embeddings.device)], labels[mine])
            # A class with fewer images than vectors: all of it, for those that have no image of their own.
            rows = torch.where(has[:, None], some, means)[found]
            at = found.nonzero()[:, 0] * self.vectors_per_class + k
            self.weight[at] = fitting(rows, self.weight)

    def extra_repr(self) -> str:
        """Shown by print(head)."""
        return f"{super().extra_repr()}, sub_centers={self.vectors_per_class}"
