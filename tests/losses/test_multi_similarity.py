import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml

from metricface.losses import MultiSimilarityLoss
from metricface.losses.multi_similarity import multi_similarity
from metricface.miners import MultiSimilarityMiner
from tests.losses import oracles
from tests.vectors import case

MINED, UNMINED = case("A8.multi_similarity_mined"), case("A8.multi_similarity_unmined")
X6 = torch.tensor(MINED["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(MINED["inputs"]["labels"])


def batch() -> torch.Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_all_pairs_and_mined_pairs_have_the_published_values() -> None:
    loss = MultiSimilarityLoss()
    assert loss(X6, LABELS).item() == pytest.approx(UNMINED["expected"], abs=1e-6)
    pairs = MultiSimilarityMiner(MINED["inputs"]["eps"])(X6, LABELS)
    assert loss(X6, LABELS, pairs).item() == pytest.approx(MINED["expected"], abs=1e-6)
    assert loss(3 * X6, LABELS, pairs).item() == pytest.approx(MINED["expected"], abs=1e-6)


def test_the_divisor_is_the_batch_size_also_where_few_anchors_have_pairs() -> None:
    x = batch()
    listed = tuple(torch.tensor([index]) for index in (2, 5, 2, 9))
    s_p, s_n = (oracles.cos(x[2].numpy(), x[j].numpy()) for j in (5, 9))
    expected = math.log1p(math.exp(-2 * (s_p - 0.5))) / 2 + math.log1p(math.exp(50 * (s_n - 0.5))) / 50
    value = MultiSimilarityLoss()(x, torch.arange(16) % 3, listed)
    assert value.item() == pytest.approx(expected / 16, rel=1e-9)


def test_an_anchor_with_one_kind_of_pair_has_the_loss_of_that_kind() -> None:
    x = batch()
    loss = MultiSimilarityLoss(2.0, 20.0, 0.4)
    for labels in (torch.zeros(16, dtype=torch.long), torch.arange(16)):
        of = oracles.partners(labels.tolist(), labels.tolist(), range(16))
        expected = oracles.multi_similarity(x.numpy(), x.numpy(), of, 2.0, 20.0, 0.4)
        assert expected > 0
        leaf = x.clone().requires_grad_()
        value = loss(leaf, labels)
        assert value.item() == pytest.approx(expected, rel=1e-9)
        assert torch.autograd.gradcheck(lambda x, labels=labels: loss(x, labels), (leaf,))


@pytest.mark.parametrize("mine", [False, True])
def test_pmls_loss_agrees(mine: bool) -> None:
    x, labels = batch(), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6, 6, 0])
    pairs = MultiSimilarityMiner()(x, labels) if mine else None
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine_value, other = MultiSimilarityLoss()(a, labels, pairs), pml.MultiSimilarityLoss()(b, labels, pairs)
    assert mine_value.item() == pytest.approx(other.item(), rel=1e-6)
    grads = torch.autograd.grad(mine_value, a)[0], torch.autograd.grad(other, b)[0]
    assert torch.allclose(*grads, atol=1e-7)


def test_empty_sets_add_nothing_to_the_plain_function() -> None:
    nothing, one = torch.empty(0), torch.tensor([0.5])
    values = [
        multi_similarity(p, n, alpha=2.0, beta=50.0, base=0.5).item() for p, n in ((nothing, one), (one, nothing))
    ]
    assert values == pytest.approx([math.log(2) / 50, math.log(2) / 2])
    assert multi_similarity(nothing, nothing, alpha=2.0, beta=50.0, base=0.5).item() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"beta": math.inf}, "beta must be above 0"),
        ({"base": math.nan}, "base must be a finite number"),
    ],
)
def test_settings_that_mean_nothing_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiSimilarityLoss(**settings)


def test_settings_are_shown() -> None:
    assert repr(MultiSimilarityLoss()) == "MultiSimilarityLoss(alpha=2.0, beta=50.0, base=0.5)"
