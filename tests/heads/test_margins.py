import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor

from metricface import heads
from metricface.heads.base import Head
from metricface.heads.sphereface import annealed_lambda, psi
from metricface.heads.sphereface2 import balanced_offset
from metricface.heads.target import Target
from tests.heads.kinds import EVERY_KIND, FREE_OF_LENGTH, KINDS, Kind, filled
from tests.vectors import case

XA, WA = case("B3.am_softmax")["inputs"]["X"], case("B3.am_softmax")["inputs"]["W_rows"]


def value_of(head: Head, x: Any, labels: Any, rows: Any) -> float:
    head.double()
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(rows, dtype=torch.float64))
    return float(head(torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(labels)).detach())


@pytest.mark.parametrize(
    ("name", "head", "part"),
    [
        ("A13.coco_normface", heads.NormFace(3, 2, scale=30.0), None),
        ("A13.coco_normface", heads.COCO(3, 2), None),
        ("B2.a_softmax", heads.SphereFace(3, 2, lambda_base=0.0, lambda_min=0.0), "lam0"),
        ("B2.l_softmax", heads.LSoftmax(3, 2, lambda_base=0.0), None),
        ("B3.am_softmax", heads.CosFace(3, 2, margin_cos=0.35, scale=30.0), None),
        ("B3.cosface_64_0.4", heads.CosFace(3, 2, margin_cos=0.4), None),
        ("B4.arcface", heads.ArcFace(3, 2), None),
        ("B5.combined_margin", heads.CombinedMargin(3, 2), "c_1_03_02"),
        ("B5.combined_margin", heads.CombinedMargin(3, 2, m1=0.9, m2=0.4, m3=0.15), "c_09_04_015"),
        ("B6.curricularface", heads.CurricularFace(3, 2), "loss"),
        ("B6.magface", heads.MagFace(3, 2), None),
        ("A14b.normface_c_losses", heads.CContrastive(4, 2), "c_contrastive"),
        ("A14b.normface_c_losses", heads.CTriplet(4, 2), "c_triplet"),
        ("A14b.normface_c_losses", heads.CTriplet(4, 2, hardest_only=True), "c_triplet_hardest"),
        ("A14b.normface_c_losses", heads.NPT(4, 2, margin_cos=0.4), "c_triplet_hardest"),
        ("A14.npt_k1", heads.NPT(4, 2), None),
        ("A14.npt_k2", heads.NPT(4, 2, k=2), None),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__ if isinstance(value, Head) else "",
)
def test_a_head_has_the_published_value(name: str, head: Head, part: str | None) -> None:
    vector = case(name)
    found = value_of(head, vector["inputs"]["X"], vector["inputs"]["labels"], vector["inputs"]["W_rows"])
    expected = vector["expected"] if part is None else vector["expected"][part]
    if name == "B6.magface":
        expected = 18.997585  # "total", whose parts are in `last`
        assert head.last is not None
        assert head.last["length_loss"].item() == pytest.approx(0.055249, abs=1e-6)
    assert found == pytest.approx(expected, abs=1e-6)


def test_sphereface_at_iteration_100_weighs_the_plain_cosine_as_published() -> None:
    vector = case("B2.a_softmax")
    head = heads.SphereFace(3, 2)
    head.iteration += 99  # counted before it is used
    assert value_of(head, XA, [0, 1, 2], WA) == pytest.approx(vector["expected"]["lam_it100"], abs=1e-6)
    assert head.annealing.item() == pytest.approx(vector["inputs"]["lam"][1], abs=1e-6)
    assert head.iteration.item() == 100


def test_l2_softmax_scales_embeddings_and_not_logits() -> None:
    vector = case("A13.l2_softmax")
    head = heads.L2Softmax(3, 2, alpha=16.0)
    with torch.no_grad():
        head.get_parameter("bias").copy_(torch.tensor(vector["inputs"]["b"]))
    found = value_of(head, vector["inputs"]["X"], vector["inputs"]["labels"], vector["inputs"]["W_rows"])
    assert found == pytest.approx(vector["expected"], abs=1e-6)


@pytest.mark.parametrize(("name", "rate"), [("B6.adaface", 0.01), ("B6.adaface_batchstats", 1.0)])
def test_adaface_moves_its_averages_before_it_uses_them(name: str, rate: float) -> None:
    vector = case(name)
    x = torch.tensor(vector["inputs"]["X"], dtype=torch.float64)
    lengths = torch.tensor(vector["inputs"]["norms"], dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * lengths[:, None]
    head = heads.AdaFace(3, 2, rate=rate)
    assert value_of(head, x, [0, 1, 2], WA) == pytest.approx(vector["expected"]["loss"], abs=1e-6)
    assert head.quality(lengths).tolist() == pytest.approx(vector["expected"]["z_hat"], abs=1e-6)


def test_adafaces_averages_stay_outside_of_training_and_survive_a_batch_of_one() -> None:
    head, x = heads.AdaFace(3, 2), torch.tensor([[3.0, 4.0]])
    head(x, torch.tensor([0]))
    assert head.length_mean.item() == pytest.approx(0.99 * 20 + 0.01 * 5)
    assert head.length_deviation.item() == 100.0  # one row has none
    before = head.length_mean.clone()
    head.eval()(x, torch.tensor([0]))
    with torch.no_grad():
        head.train()(x, torch.tensor([0]))
    assert torch.equal(head.length_mean, before)


def test_curricularfaces_average_is_that_of_the_target_cosines_and_comes_first() -> None:
    head = heads.CurricularFace(3, 2)
    assert value_of(head, XA, [0, 1, 2], WA) == pytest.approx(case("B6.curricularface")["expected"]["loss"], abs=1e-6)
    assert head.t.item() == pytest.approx(case("B6.curricularface")["expected"]["t"], abs=1e-6)


def test_sphereface2_has_the_published_value_and_a_bias_that_balances_both_pulls() -> None:
    vector = case("B6.sphereface2")
    head = heads.SphereFace2(3, 2).double()
    # The released closed form subtracts nearly equal numbers here: its value is right to 2e-5 only.
    assert head.offset.item() == pytest.approx(vector["expected"]["b_init"], abs=1e-4)
    with torch.no_grad():
        head.offset.fill_(vector["inputs"]["b"])
    assert value_of(head, XA, [0, 1, 2], WA) == pytest.approx(vector["expected"]["loss"], abs=1e-6)
    for classes, weight, m, r, t in ((2, 0.7, 0.4, 40.0, 3.0), (3, 0.7, 0.4, 10.0, 3.0), (10**6, 0.8, 0.5, 64.0, 3.0)):
        b, g = balanced_offset(classes, weight, m, r, t), 2 * 0.5**t - 1
        # logistic slopes 1 / (1 + e^v), as logarithms: they may be as small as e^-60
        positive = math.log(weight) - max(0.0, r * (g - m) + b) - math.log1p(math.exp(-abs(r * (g - m) + b)))
        negative = r * (g + m) + b
        negative = (
            math.log((1 - weight) * (classes - 1))
            + negative
            - max(0.0, negative)
            - math.log1p(math.exp(-abs(negative)))
        )
        assert positive == pytest.approx(negative, abs=1e-6)
    assert balanced_offset(1, 0.7, 0.4, 40.0, 3.0) == 0.0


def test_sub_center_arcface_takes_the_nearest_vector_of_each_class() -> None:
    vector = case("B6.subcenter_arcface")
    head = heads.SubCenterArcFace(3, 2, sub_centers=2)
    inputs = vector["inputs"]
    found = value_of(head, inputs["X"], inputs["labels"], inputs["W_rows_class_major"])
    assert found == pytest.approx(vector["expected"], abs=1e-6)


@pytest.mark.parametrize(("rule", "name"), [("monotone", "fixed"), ("easy", "easy_margin"), ("none", "no_fix")])
def test_arcface_beyond_pi_follows_its_three_conventions(rule: Any, name: str) -> None:
    vector = case("B4.arcface_theta_plus_m_gt_pi")
    inputs = vector["inputs"]
    head = heads.ArcFace(3, 2, beyond_pi=rule)
    found = value_of(head, inputs["x"], [inputs["label"]], inputs["W_rows"])
    assert found == pytest.approx(vector["expected"][name], abs=1e-6)


def test_arcface_differentiates_its_margin_unless_it_is_detached() -> None:
    vector = case("B4.arcface_gradient")
    for detach, name in ((False, "true"), (True, "insightface_head")):
        head = heads.ArcFace(2, 2, detach_margin=detach)
        cos = torch.tensor([vector["inputs"]["cos"]], dtype=torch.float64, requires_grad=True)
        sin = (1 - cos.square()).sqrt()
        target = head.target_cos(Target(cos, sin, torch.ones(1, dtype=torch.float64)))
        (slope,) = torch.autograd.grad([64.0 * target.sum()], [cos])
        assert slope.item() == pytest.approx(vector["expected"][name], abs=1e-5)
    # and through the whole head: the two differ in their gradient, not in value
    found = []
    for detach in (False, True):
        head = heads.ArcFace(3, 2, detach_margin=detach)
        x = torch.tensor(XA, dtype=torch.float64, requires_grad=True)
        head.double().weight.data.copy_(torch.tensor(WA))
        loss = head(x, torch.tensor([0, 1, 2]))
        found.append((loss.item(), torch.autograd.grad(loss, x)[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert not torch.allclose(found[0][1], found[1][1], rtol=0.05)


def test_combined_margin_does_not_drop_m2_where_m3_is_given() -> None:
    trap = case("B5.combined_margin_torch_trap")["expected"]
    assert value_of(heads.CosFace(3, 2, margin_cos=0.2), XA, [0, 1, 2], WA) == pytest.approx(trap, abs=1e-6)
    assert value_of(heads.CombinedMargin(3, 2, m1=1.0, m2=0.3, m3=0.2), XA, [0, 1, 2], WA) > trap + 6


def test_npt_masks_the_own_class_with_minus_infinity_and_not_zero() -> None:
    vector = case("A14.npt_zero_mask_bug")
    cos = vector["inputs"]["cos"][0]
    rows = [[c, math.sqrt(1 - c * c)] for c in cos]
    found = value_of(heads.NPT(3, 2, margin_cos=vector["inputs"]["margin_cos"]), [[1.0, 0.0]], [0], rows)
    assert found == pytest.approx(vector["expected"]["formula"], abs=1e-6)
    assert 2 * max(0.0, 0.0 - cos[0] + 0.5) == pytest.approx(vector["expected"]["released_code"])


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_psi_falls_all_the_way_as_published(margin: int) -> None:
    vector = case("B2.psi_m4" if margin == 4 else "B2.psi_m2_m3")
    theta = torch.tensor(vector["inputs"]["theta_deg"], dtype=torch.float64).deg2rad()
    expected = vector["expected"] if margin == 4 else vector["expected"][f"m{margin}"]
    assert psi(theta.cos(), margin).tolist() == pytest.approx(expected, abs=1e-6)
    fine = psi(torch.linspace(0, torch.pi, 10_001, dtype=torch.float64).cos(), margin)
    steps = fine.diff()
    assert (steps < 1e-9).all()
    assert steps.abs().max() < 0.01  # continuous


def test_lambda_falls_as_published_and_is_counted_before_it_is_used() -> None:
    sphere, mnist = case("B2.lambda_schedule"), case("B2.lambda_lsoftmax_mnist")
    for step, expected in zip(sphere["inputs"]["it"], sphere["expected"], strict=True):
        found = annealed_lambda(torch.tensor(step), base=1000, gamma=0.12, power=1, least=5).item()
        assert found == pytest.approx(expected, abs=1e-6)
    for step, expected in zip(mnist["inputs"]["it"], mnist["expected"], strict=True):
        found = annealed_lambda(torch.tensor(step), base=1000, gamma=2.5e-5, power=35, least=0).item()
        assert found == pytest.approx(expected, abs=1e-6)
    head = heads.SphereFace(3, 2)
    x, labels = torch.tensor(XA), torch.tensor([0, 1, 2])
    for step in (1, 2):
        head(x, labels)
        assert head.annealing.item() == pytest.approx(sphere["expected"][step - 1], abs=1e-6)
    head.eval()(x, labels)
    with torch.no_grad():
        head.train()(x, labels)
    assert head.iteration.item() == 2  # steps of training only
    again = heads.SphereFace(3, 2)
    again.load_state_dict(head.state_dict())
    assert again.annealing.item() == head.annealing.item()


def test_bounds_of_scales_and_lengths_are_the_published_ones() -> None:
    vector = case("B1.normface_bound")
    for (n, s), expected in zip(vector["inputs"]["pairs"], vector["expected"], strict=True):
        assert heads.loss_lower_bound(n, s) == pytest.approx(expected, rel=1e-5)
    vector = case("B1.s_lower_bound")
    pairs = [(c, p) for c in vector["inputs"]["C"] for p in vector["inputs"]["P"]]
    found = [heads.scale_lower_bound(c, p) for c, p in pairs]
    assert found == pytest.approx(vector["expected"], abs=1e-6)
    vector = case("B1.l2softmax_alpha_low")
    assert [heads.alpha_lower_bound(c) for c in vector["inputs"]["C"]] == pytest.approx(vector["expected"], abs=1e-6)
    for bound, classes, number in (
        (heads.scale_lower_bound, 1, 0.9),
        (heads.scale_lower_bound, 10, 1.0),
        (heads.loss_lower_bound, 1, 2.0),
        (heads.alpha_lower_bound, 2, 0.9),
    ):
        with pytest.raises(ValueError, match="needs num_classes"):
            bound(classes, number)


def test_normface_starts_where_probability_999_can_be_reached_and_learns_its_scale() -> None:
    head = heads.NormFace(1000, 8)
    assert head.get_parameter("scale").item() == pytest.approx(heads.scale_lower_bound(1000, 0.999))
    # at the best arrangement of class vectors, a simplex, its loss is the bound
    simplex = torch.eye(5, dtype=torch.float64) - 0.2
    best = value_of(heads.NormFace(5, 5, scale=7.0), simplex, torch.arange(5), simplex)
    assert best == pytest.approx(heads.loss_lower_bound(5, 7.0), rel=1e-9)
    small = heads.NormFace(3, 2, scale=0.02)
    with torch.no_grad():
        small.get_parameter("scale").fill_(-1.0)
    loss = small(torch.tensor(XA), torch.tensor([0, 1, 2]))
    loss.backward()
    scale = small.get_parameter("scale")
    assert loss.item() == pytest.approx(math.log(3), abs=0.02)  # counts as 0.01
    assert scale.grad is not None
    assert scale.grad.item() != 0.0  # and can leave


# Neighbours: equal where theory says so.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (heads.ArcFace(5, 4, margin_rad=0.0, scale=9.0), heads.NormFace(5, 4, scale=9.0)),
        (heads.CosFace(5, 4, margin_cos=0.0, scale=9.0), heads.NormFace(5, 4, scale=9.0)),
        (heads.COCO(5, 4, scale=9.0), heads.NormFace(5, 4, scale=9.0)),
        (heads.CombinedMargin(5, 4, m2=0.3, m3=0.0), heads.ArcFace(5, 4, margin_rad=0.3, beyond_pi="none")),
        (heads.CombinedMargin(5, 4, m2=0.0, m3=0.2), heads.CosFace(5, 4, margin_cos=0.2)),
        (heads.SubCenterArcFace(5, 4, sub_centers=1), heads.ArcFace(5, 4)),
        (heads.LSoftmax(5, 4, margin=1), heads.Softmax(5, 4, bias=False)),
        (
            heads.MagFace(5, 4, least_margin=0.4, most_margin=0.4 + 1e-12, length_weight=0.0),
            heads.ArcFace(5, 4, margin_rad=0.4, beyond_pi="easy"),
        ),
        (heads.AdaFace(5, 4, margin=0.3, h=0.0), heads.CosFace(5, 4, margin_cos=0.3)),
        (heads.NPT(5, 4, k=4, margin_cos=0.4), heads.CTriplet(5, 4, margin=0.8)),
    ],
    ids=lambda head: type(head).__name__,
)
def test_neighbours_agree_where_theory_says_so(one: Head, other: Head) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(30, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (30,), generator=generator)
    filled(one)
    filled(other)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    mine, theirs = one(a, labels), other(b, labels)
    mine.backward()
    theirs.backward()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=1e-9)


def test_sphereface_without_a_factor_is_the_modified_softmax_at_any_lambda() -> None:
    x = torch.tensor(XA, dtype=torch.float64)
    rows = torch.tensor(WA, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(x @ rows.T, torch.tensor([0, 1, 2])).item()
    for least in (0.0, 5.0):
        head = heads.SphereFace(3, 2, margin=1, lambda_min=least)
        assert value_of(head, XA, [0, 1, 2], WA) == pytest.approx(expected, rel=1e-12)


def test_curricularface_is_arcface_where_no_class_is_hard() -> None:
    rows = torch.eye(4, dtype=torch.float64)
    x = rows + 0.05
    curricular = value_of(heads.CurricularFace(4, 4), x, torch.arange(4), rows)
    assert curricular == pytest.approx(value_of(heads.ArcFace(4, 4), x, torch.arange(4), rows), rel=1e-12)


def test_npt_is_the_limit_of_cosface_at_large_scales() -> None:
    generator = torch.Generator().manual_seed(8)
    x, rows = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (9, 5))
    labels = torch.arange(9) % 5
    scale = 1e5
    cosface = value_of(heads.CosFace(5, 6, margin_cos=0.5, scale=scale), x, labels, rows)
    assert 2 * cosface / scale == pytest.approx(value_of(heads.NPT(5, 6), x, labels, rows), rel=1e-4)


# pytorch-metric-learning.


@pytest.mark.parametrize(
    ("ours", "theirs", "factor"),
    [
        (heads.ArcFace(5, 8), pml.ArcFaceLoss(5, 8, margin=math.degrees(0.5), scale=64), 1.0),
        (heads.CosFace(5, 8), pml.CosFaceLoss(5, 8, margin=0.35, scale=64), 1.0),
        (heads.NormFace(5, 8, scale=20.0), pml.NormalizedSoftmaxLoss(5, 8, temperature=0.05), 1.0),
        (heads.LSoftmax(5, 8, lambda_base=0.0), pml.LargeMarginSoftmaxLoss(5, 8, margin=4, scale=1), 1.0),
        (
            heads.SphereFace(5, 8, lambda_base=0.0, lambda_min=0.0),
            pml.SphereFaceLoss(5, 8, margin=4, scale=1),
            1.0,
        ),
        (
            heads.SubCenterArcFace(5, 8, sub_centers=3),
            pml.SubCenterArcFaceLoss(
                num_classes=5, embedding_size=8, margin=math.degrees(0.5), scale=64, sub_centers=3
            ),
            1.0,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_agrees_with_pml_in_value_and_gradient_where_it_follows_the_paper(
    ours: Head, theirs: torch.nn.Module, factor: float
) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(16, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (16,), generator=generator)
    filled(ours)
    theirs.double()
    with torch.no_grad():
        theirs.get_parameter("W").copy_(ours.weight.T)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    mine, other = ours(a, labels), theirs(b, labels)
    mine.backward()
    other.backward()
    assert mine.item() == pytest.approx(factor * other.item(), rel=1e-5)
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_pmls_sphereface_has_no_lambda_as_the_paper_trains_it() -> None:
    theirs = pml.SphereFaceLoss(3, 2, margin=4, scale=1).double()
    with torch.no_grad():
        theirs.W.copy_(torch.tensor(WA).T)
    value = theirs(torch.tensor(XA, dtype=torch.float64), torch.tensor([0, 1, 2])).item()
    assert value == pytest.approx(case("B2.a_softmax")["expected"]["lam0"], abs=1e-5)
    head = heads.SphereFace(3, 2)
    head.iteration += 99
    assert value_of(head, XA, [0, 1, 2], WA) < value - 1.9


# Angles at which an arc cosine has no derivative.


def at_angle(degrees: float, dim: int = 64, rows: int = 32, seed: int = 10) -> tuple[Tensor, Tensor]:
    """Class vectors and embeddings at that angle from theirs, float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator))
    side = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    side = torch.nn.functional.normalize(side - (side * w).sum(dim=1, keepdim=True) * w)
    angle = math.radians(degrees)
    return w, math.cos(angle) * w + math.sin(angle) * side


@EVERY_KIND
@pytest.mark.parametrize("degrees", [0.0, 180.0])
def test_value_and_gradient_are_finite_exactly_on_a_class_and_opposite(kind: Kind, degrees: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        head = kind.make(2, 3).eval()
        sign = 1.0 if degrees == 0.0 else -1.0
        with torch.no_grad():
            head.weight.zero_()
            head.weight[: head.vectors_per_class, 0] = 1.0
            head.weight[head.vectors_per_class :, 1] = 1.0
        x = torch.tensor([[sign, 0.0, 0.0], [sign, 0.0, 0.0]], dtype=dtype).requires_grad_()
        loss = head(x, torch.tensor([0, 0]))
        loss.backward()
        assert torch.isfinite(loss)
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        for parameter in head.parameters():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()


@EVERY_KIND
@pytest.mark.parametrize("degrees", [0.0, 0.01, 0.1, 1.0, 2.0, 3.0, 5.0, 178.0, 179.99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_small_and_large_angles_is_finite_and_near_float32(
    kind: Kind, degrees: float, dtype: torch.dtype
) -> None:
    w, x = at_angle(degrees)
    labels = torch.arange(len(w))
    head = kind.make(len(w), w.shape[1]).eval()
    with torch.no_grad():
        head.weight.copy_(w.repeat_interleave(head.vectors_per_class, 0))
    half, exact = (7.0 * x).to(dtype).requires_grad_(), (7.0 * x).to(dtype).double().requires_grad_()
    loss = head(half, labels)
    loss.backward()
    expected = head.double()(exact, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert half.grad is not None
    assert exact.grad is not None
    assert torch.isfinite(half.grad).all()
    # As good as the half type holds it, beside the largest gradient of the batch.
    worst = (half.grad.double() - exact.grad).abs().max() / exact.grad.abs().max().clamp_min(1e-12)
    assert worst < 0.02


@pytest.mark.parametrize("degrees", [0.01, 0.1, 1.0, 3.0])
def test_arcface_in_float32_keeps_its_gradient_at_angles_where_one_minus_cos_squared_has_none(degrees: float) -> None:
    w, x = at_angle(degrees)
    found = []
    for dtype in (torch.float32, torch.float64):
        head = heads.ArcFace(len(w), w.shape[1]).to(dtype)
        with torch.no_grad():
            head.weight.copy_(w.float())
        a = x.float().to(dtype).requires_grad_()
        loss = head(a, torch.arange(len(w)))
        loss.backward()
        assert a.grad is not None
        found.append((loss.item(), a.grad.double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=2e-3 * found[1][1].abs().max().item())


def test_pmls_arcface_is_not_finite_in_bfloat16_at_small_angles_and_ours_is() -> None:
    w, x = at_angle(2.0)
    theirs = pml.ArcFaceLoss(len(w), w.shape[1], margin=math.degrees(0.5), scale=64)
    with torch.no_grad():
        theirs.W.copy_(w.T.float())
    half = x.bfloat16().requires_grad_()
    theirs(half, torch.arange(len(w))).backward()
    assert half.grad is not None
    assert not torch.isfinite(half.grad).all()  # the documented difference


@pytest.mark.parametrize("name", FREE_OF_LENGTH)
def test_gradient_turns_and_does_not_lengthen_an_embedding_whose_length_is_divided_away(name: str) -> None:
    head = filled(KINDS[name].make(6, 5)).eval()
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(11)).requires_grad_()
    (gradient,) = torch.autograd.grad(head(x, torch.arange(8) % 6), x)
    assert torch.allclose((gradient * x).sum(dim=1), torch.zeros(8, dtype=torch.float64), atol=1e-10)


# What the heads make of an angle.


def test_target_curves_are_the_formulas() -> None:
    theta = torch.linspace(0, torch.pi, 181, dtype=torch.float64)
    cos = theta.cos()
    curve = heads.target_curve
    for plain in (heads.Softmax(3, 2), heads.NormFace(3, 2), heads.COCO(3, 2), heads.L2Softmax(3, 2)):
        assert torch.allclose(curve(plain, theta), cos)
    assert torch.allclose(curve(heads.CosFace(3, 2), theta), cos - 0.35)
    assert torch.allclose(curve(heads.ArcFace(3, 2, beyond_pi="none"), theta), (theta + 0.5).cos())
    monotone = curve(heads.ArcFace(3, 2), theta)
    assert (monotone.diff() < 0).all()
    assert torch.allclose(monotone[theta + 0.5 > torch.pi], (cos - 0.5 * math.sin(0.5))[theta + 0.5 > torch.pi])
    easy = curve(heads.ArcFace(3, 2, beyond_pi="easy"), theta)
    assert torch.allclose(easy[theta > torch.pi / 2 + 1e-6], cos[theta > torch.pi / 2 + 1e-6])
    combined = curve(heads.CombinedMargin(3, 2, m1=0.9, m2=0.4, m3=0.15), theta)
    assert torch.allclose(combined, (0.9 * theta + 0.4).cos() - 0.15)
    sphere = curve(heads.SphereFace(3, 2, lambda_base=0.0, lambda_min=0.0), theta)
    assert torch.allclose(sphere, psi(cos, 4))
    annealed = curve(heads.SphereFace(3, 2, lambda_base=0.0, lambda_min=5.0), theta)
    assert torch.allclose(annealed, (5 * cos + psi(cos, 4)) / 6)
    short, long = (curve(heads.MagFace(3, 2), theta[:90], length=length) for length in (10.0, 110.0))
    assert torch.allclose(short, (theta[:90] + 0.45).cos())
    assert torch.allclose(long, (theta[:90] + 0.8).cos())
    ada = curve(heads.AdaFace(3, 2), theta, length=20.0)  # of average length: CosFace
    assert torch.allclose(ada, cos - 0.4)
    g = 2 * ((cos + 1) / 2) ** 3 - 1
    assert torch.allclose(curve(heads.SphereFace2(3, 2), theta), g - 0.4)


def test_target_curve_is_the_logit_that_training_uses() -> None:
    theta = torch.tensor([0.3, 1.1, 2.0, 2.9], dtype=torch.float64)
    x = torch.stack([theta.cos(), theta.sin()], dim=1)
    for name in ("cosface", "arcface", "arcface, easy", "combined", "normface"):
        head = KINDS[name].make(2, 2).double()
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        for row, angle in zip(x, theta, strict=True):
            loss = head(row[None], torch.tensor([0])).item()
            scale = float(head.scale)  # type: ignore[arg-type]
            own = scale * heads.target_curve(head, angle[None]).item()
            other = scale * -row[1].item()
            assert loss == pytest.approx(math.log1p(math.exp(other - own)) if other - own < 30 else other - own)


def test_target_curve_refuses_what_is_no_angle() -> None:
    for theta in ([-0.1], [4.0], [math.nan]):
        with pytest.raises(ValueError, match=r"theta_rad must lie in \[0, pi\]"):
            heads.target_curve(heads.CosFace(3, 2), torch.tensor(theta))
    with pytest.raises(ValueError, match="length must be 0 or more"):
        heads.target_curve(heads.MagFace(3, 2), torch.tensor([1.0]), length=-1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.ArcFace(3, 2, margin_rad=28.6), r"margin_rad must lie in \[0, 3.14159\)"),
        (lambda: heads.ArcFace(3, 2, beyond_pi="hard"), "beyond_pi='hard' is unknown; use one of 'monotone'"),  # type: ignore[arg-type]
        (lambda: heads.CombinedMargin(3, 2, m1=0.0), r"m1 must lie in \(0, 10\)"),
        (lambda: heads.CombinedMargin(3, 2, m3=math.nan), "m3 must lie in"),
        (lambda: heads.SphereFace(3, 2, margin=1.35), "margin multiplies the angle: it must be a whole number"),  # type: ignore[arg-type]
        (lambda: heads.SphereFace(3, 2, lambda_min=-1.0), "lambda_min must lie in"),
        (lambda: heads.SubCenterArcFace(3, 2, sub_centers=0), "sub_centers must be a whole number"),
        (lambda: heads.AdaFace(3, 2, rate=2.0), "rate must lie in"),
        (lambda: heads.MagFace(3, 2, least_length=20.0, most_length=10.0), "most_length must lie in"),
        (lambda: heads.CurricularFace(3, 2, margin_rad=-0.1), "margin_rad must lie in"),
        (lambda: heads.SphereFace2(3, 2, positive_weight=1.0), "positive_weight must lie in"),
        (lambda: heads.NPT(3, 2, k=0), "k must be a whole number"),
        (lambda: heads.CContrastive(3, 2, margin=0.0), "margin must lie in"),
        (lambda: heads.CTriplet(3, 2, margin=-0.1), "margin must lie in"),
        (lambda: heads.L2Softmax(3, 2, alpha=0.0), "alpha must be a finite number above 0"),
        (lambda: heads.NormFace(3, 2, scale=0.0), "scale must be a finite number above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
