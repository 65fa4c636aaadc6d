import math

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor

from metricface.losses import AngularLoss
from metricface.losses.angular import angular, angular_hinge
from tests.vectors import case

SINGLE, N_PAIR = case("A6.angular_single"), case("A6.angular_npair")
PML, PML_RAW = case("A6.angular_pml"), case("A6.angular_pml_unnormalised_negatives")


def rows(name: str, vector: dict[str, dict[str, object]]) -> Tensor:
    return torch.tensor(vector["inputs"][name], dtype=torch.float64)


def test_hinge_and_exponent_of_one_triplet_differ_by_the_published_constant() -> None:
    a, p, n = (rows(name, SINGLE)[None] for name in "apn")
    alpha, expected = SINGLE["inputs"]["alpha_deg"], SINGLE["expected"]
    dots = [(one * other).sum(dim=1) for one, other in ((a, p), (a, n), (p, n))]
    exponent = angular(*dots, alpha_deg=alpha)
    assert exponent.item() == pytest.approx(expected["f_apn"], abs=1e-6)
    assert angular_hinge(a, p, n, alpha_deg=alpha).item() == pytest.approx(expected["hinge"], abs=1e-6)
    sq_tan = math.tan(math.radians(alpha)) ** 2
    assert 2 - 6 * sq_tan == pytest.approx(expected["const"], abs=1e-6)
    assert exponent.item() + 2 - 6 * sq_tan == pytest.approx(expected["arg"], abs=1e-6)


def test_the_hinge_is_0_where_the_negative_is_far() -> None:
    a, p, n = (torch.tensor([row], dtype=torch.float64) for row in ([1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]))
    assert angular_hinge(a, p, n, alpha_deg=45.0).item() == 0.0


def test_one_pair_of_each_identity_has_the_published_value() -> None:
    labels = torch.arange(2)
    loss = AngularLoss(N_PAIR["inputs"]["alpha_deg"])
    value = loss(rows("anchors", N_PAIR), labels, None, rows("positives", N_PAIR), labels)
    assert value.item() == pytest.approx(N_PAIR["expected"], abs=1e-6)


def test_on_unit_rows_pmls_loss_agrees() -> None:
    x, labels = rows("X", PML), torch.tensor(PML["inputs"]["labels"])
    ours, theirs = AngularLoss(PML["inputs"]["alpha_deg"]), pml.AngularLoss(PML["inputs"]["alpha_deg"])
    assert ours(x, labels).item() == pytest.approx(PML["expected"], abs=1e-6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, other = ours(a, labels), theirs(b, labels)
    assert mine.item() == pytest.approx(other.item(), rel=1e-6)


def test_negatives_are_normalised_too_which_pmls_are_not() -> None:
    """PML 2.9.0: anchors and positives have length 1, negatives the length they come in."""
    x, labels = rows("X", PML_RAW), torch.tensor(PML_RAW["inputs"]["labels"])
    alpha = PML_RAW["inputs"]["alpha_deg"]
    assert pml.AngularLoss(alpha)(x, labels).item() == pytest.approx(PML_RAW["expected"], abs=1e-6)
    assert AngularLoss(alpha)(x, labels).item() == pytest.approx(PML["expected"], abs=1e-6)


@pytest.mark.parametrize("angle", [0.0, 90.0, -45.0, math.nan, True])
def test_an_angle_that_means_nothing_is_an_error(angle: float) -> None:
    with pytest.raises(ValueError, match=r"alpha_deg must lie in \(0, 90\)"):
        AngularLoss(angle)


def test_settings_are_shown() -> None:
    assert repr(AngularLoss()) == "AngularLoss(alpha_deg=45.0)"
