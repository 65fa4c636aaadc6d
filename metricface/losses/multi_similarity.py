"""Multi-similarity loss: positives below a cosine and negatives above it, each anchor's weighed against one another."""

from torch import Tensor
from torch.nn import functional as F

from metricface.choices import is_number
from metricface.losses.anchor_sets import Exponents, Linear, SetLoss, Sets


def multi_similarity(cos_ap: Tensor, cos_an: Tensor, *, alpha: float, beta: float, base: float) -> Tensor:
    """Multi-similarity loss of each anchor, unreduced.

    cos_ap: (..., K) cosines of an anchor with its positives; cos_an: (..., L) with its negatives; K and L may be 0.
    Returns (...): 1/alpha ln(1 + sum exp(-alpha (cos_ap - base))) + 1/beta ln(1 + sum exp(beta (cos_an - base))).
    Source: Wang et al. 2019, Multi-Similarity Loss with General Pair Weighting.
    """
    return _losses(_exponents(alpha, beta, base).of(1.0 - cos_ap, 1.0 - cos_an), alpha, beta)


def _exponents(alpha: float, beta: float, base: float) -> Exponents:
    return Exponents(Linear(alpha * (base - 1.0), alpha), Linear(beta * (1.0 - base), -beta), squared=True)


def _losses(sets: Sets, alpha: float, beta: float) -> Tensor:
    # ln(1 + sum exp) is the softplus of the log-sum-exp, 0 for an empty set.
    return F.softplus(sets.positive) / alpha + F.softplus(sets.negative) / beta


class MultiSimilarityLoss(SetLoss):
    """Wang et al.'s multi-similarity loss.

    alpha, beta: how sharply far positives and close negatives stand out; base: the cosine that parts them (in the paper
    lambda). The paper's are 2, 50 and 0.5, on the pairs that MultiSimilarityMiner chooses, with epsilon = 0.1.
    Similarity: cosine; rows are scaled to length 1, a zero row has cosine 0 with all. Reduction: the sum over anchors
    divided by the batch size B, anchors without any pair included; an empty set adds 0.

    pytorch-metric-learning's loss of this name is the same. The authors' code also leaves out positives of cosine
    1 - 1e-5 or more, and cannot do without a positive.
    Source: Wang et al. 2019, Multi-Similarity Loss with General Pair Weighting.
    """

    cosine = True
    needs_both = False

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name} must be above 0 and finite, the weight of a cosine; got {value!r}.")
        if not is_number(base):
            raise ValueError(f"base must be a finite number, the cosine that parts the pairs; got {base!r}.")
        self.alpha, self.beta, self.base = alpha, beta, base

    def _exponents(self) -> Exponents:
        return _exponents(self.alpha, self.beta, self.base)

    def _losses(self, sets: Sets) -> Tensor:
        return _losses(sets, self.alpha, self.beta)

    def extra_repr(self) -> str:
        """Shown by print(loss)."""
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}"
