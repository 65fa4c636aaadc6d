import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor

from metricface.losses import CircleLoss
from metricface.losses.circle import circle
from tests.losses import oracles
from tests.vectors import case

FLAT, PER_ANCHOR, GRADIENT = case("A9.circle_flat"), case("A9.circle_per_anchor"), case("A9.circle_gradient")
X6 = torch.tensor(FLAT["inputs"]["X"], dtype=torch.float64)
LABELS = torch.tensor(FLAT["inputs"]["labels"])


def batch() -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_one_loss_of_all_unordered_pairs_has_the_published_value_and_is_another_loss() -> None:
    cos, same = X6 @ X6.T, LABELS[:, None] == LABELS
    upper = torch.ones(6, 6, dtype=torch.bool).triu(1)
    value = circle(cos[upper & same], cos[upper & ~same], margin=FLAT["inputs"]["m"], gamma=FLAT["inputs"]["gamma"])
    assert value.item() == pytest.approx(FLAT["expected"], abs=1e-5)
    assert CircleLoss()(X6, LABELS).item() != pytest.approx(FLAT["expected"], rel=0.01)


def test_one_loss_for_each_anchor_has_the_published_mean() -> None:
    loss = CircleLoss(PER_ANCHOR["inputs"]["m"], PER_ANCHOR["inputs"]["gamma"])
    assert loss(X6, LABELS).item() == pytest.approx(PER_ANCHOR["expected"], abs=1e-6)
    assert loss(5 * X6, LABELS).item() == pytest.approx(PER_ANCHOR["expected"], abs=1e-6)


def test_weights_have_no_gradient() -> None:
    inputs, expected = GRADIENT["inputs"], GRADIENT["expected"]
    s_p, s_n = (torch.tensor([inputs[name]], dtype=torch.float64, requires_grad=True) for name in ("sp", "sn"))
    value = circle(s_p, s_n, margin=inputs["m"], gamma=inputs["gamma"])
    by_p, by_n = torch.autograd.grad(value, (s_p, s_n))
    found = [value.item(), by_n.item(), by_p.item()]
    assert found == pytest.approx([expected["loss"], expected["d_sn"], expected["d_sp"]], abs=1e-6)


@pytest.mark.parametrize("listed", [False, True])
def test_the_gradient_of_a_batch_is_that_of_autograd_with_detached_weights(listed: bool) -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4])
    margin, gamma = 0.25, 24.0
    x = batch().requires_grad_()
    unit = x / x.square().sum(dim=1, keepdim=True).sqrt()
    cos = unit @ unit.T
    same, other = labels[:, None] == labels, labels[:, None] != labels
    same = same & ~torch.eye(12, dtype=torch.bool)
    of_near = -gamma * (1 + margin - cos.detach()).clamp_min(0) * (cos - 1 + margin)
    of_far = gamma * (cos.detach() + margin).clamp_min(0) * (cos - margin)
    sums = [v.masked_fill(~m, -1e9).logsumexp(dim=1) for v, m in ((of_near, same), (of_far, other))]
    has_both = same.any(dim=1) & other.any(dim=1)
    expected = torch.nn.functional.softplus(sums[0] + sums[1])[has_both].mean()
    indices = (*same.nonzero().unbind(1), *other.nonzero().unbind(1)) if listed else None
    value = CircleLoss(margin, gamma)(x, labels, indices)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    grads = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in (value, expected)]
    assert torch.allclose(grads[0], grads[1], rtol=1e-8, atol=1e-10)


def test_negatives_beyond_the_margin_weigh_nothing_even_if_all_are() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0], [-1.0, 0.01]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    value = CircleLoss()(x, labels)
    of = oracles.partners(labels.tolist(), labels.tolist(), range(4))
    assert value.item() == pytest.approx(oracles.circle(x.detach().numpy(), x.detach().numpy(), of, 0.25, 256.0))
    (grad,) = torch.autograd.grad(value, x)
    assert torch.isfinite(grad).all()


def test_pmls_loss_agrees_where_every_anchor_has_a_loss() -> None:
    x, labels = batch(), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4])  # the anchor of identity 3 has none
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, other = CircleLoss(0.4, 80)(a, labels), pml.CircleLoss()(b, labels)
    assert mine.item() == pytest.approx(other.item(), rel=1e-6)
    grads = torch.autograd.grad(mine, a)[0], torch.autograd.grad(other, b)[0]
    assert torch.allclose(*grads, atol=1e-6)


def test_pml_does_not_count_an_anchor_whose_loss_is_0_and_ours_does() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-0.6, 0.8]])
    labels = torch.tensor([0, 0, 1, 1])
    mine, other = CircleLoss(0.25, 4000.0)(x, labels).item(), pml.CircleLoss(0.25, 4000.0)(x, labels).item()
    assert other == pytest.approx(2 * mine, rel=1e-4)  # the first two lose nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": -0.1}, r"margin must lie in \[0, 1\)"),
        ({"margin": 1.0}, r"margin must lie in \[0, 1\)"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"gamma": math.nan}, "gamma must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CircleLoss(**settings)


def test_settings_are_shown() -> None:
    assert repr(CircleLoss()) == "CircleLoss(margin=0.25, gamma=256.0)"
