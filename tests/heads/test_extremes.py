"""Heads where something is wrong: NaN weights, collapsed or tiny embeddings, state in half precision."""

import gc
import math

import pytest
import torch

from metricface import heads
from metricface.heads.base import Head
from metricface.heads.sphereface2 import balanced_offset
from tests.heads.kinds import EVERY_KIND, KINDS, Kind, filled


@EVERY_KIND
@pytest.mark.parametrize("streaming", [False, True])
def test_a_nan_among_the_class_vectors_shows_in_the_loss(kind: Kind, streaming: bool) -> None:
    head = kind.make(5, 8, streaming=streaming)
    with torch.no_grad():
        head.weight[-1] = math.nan
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert head(x, torch.tensor([0, 0, 1, 1])).isnan()
    assert head.last is not None
    assert head.last["accuracy"] != 1.0


def test_what_is_held_for_the_backward_pass_is_given_to_autograd() -> None:
    numbers: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        numbers.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        heads.Softmax(3000, 4)(torch.randn(64, 4), torch.arange(64))
    assert 64 * 3000 in numbers  # so checkpointing and offloading see it


def test_what_is_held_for_the_backward_pass_is_freed_by_it() -> None:
    head, x = heads.Softmax(3001, 4), torch.randn(64, 4)
    loss = head(x, torch.arange(64))
    loss.backward()
    gc.collect()
    assert loss.grad_fn is not None  # alive, as in a loop that keeps its losses
    assert not [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (64, 3001)]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["arcface", "combined", "magface", "curricularface", "adaface", "sub-center"])
@pytest.mark.parametrize("dead", [1e-8, 1e-12, 1e-16, 1e-22])
def test_an_embedding_that_differs_from_its_class_in_a_dead_coordinate_only_has_a_bounded_gradient(
    name: str, dead: float
) -> None:
    head = KINDS[name].make(2, 3).eval()
    with torch.no_grad():
        head.weight.copy_(
            torch.tensor([[3.0, dead, 1.0], [3.0, 0.5, 1.0]]).repeat_interleave(head.vectors_per_class, 0)
        )
    x = torch.tensor([[3.0, 0.0, 1.0]]).requires_grad_()
    head(x, torch.tensor([0])).backward()
    for tensor in (x, head.weight):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() < 50.0


@EVERY_KIND
@pytest.mark.parametrize("length", [1e-10, 1e-14, 1e-18, 1e-25, 1e-38])
def test_short_embeddings_have_finite_gradients(kind: Kind, length: float) -> None:
    head = kind.make(5, 8).eval()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * length
    x.requires_grad_()
    head(x, torch.tensor([0, 0, 1, 1])).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moving_averages_go_on_moving_in_a_head_of_half_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, labels = 5.0 * torch.randn(16, 8, generator=generator), torch.arange(16) % 4
    for name in ("length_mean", "length_deviation", "t"):
        found = []
        for to in (torch.float32, dtype):
            head: Head = heads.CurricularFace(4, 8) if name == "t" else heads.AdaFace(4, 8)
            head.class_weights_from(x, labels)
            head.to(to)
            for _ in range(400):
                head(x.to(to), labels)
            found.append(head.get_buffer(name).item())
        assert found[1] == pytest.approx(found[0], rel=0.02)


@EVERY_KIND
def test_embeddings_that_overflow_in_the_head_are_refused_whatever_their_own_type(kind: Kind) -> None:
    head, labels = kind.make(3, 8), torch.tensor([0, 1])
    for factor in (1e20, 1e40):
        with pytest.raises(ValueError, match="longer than"):
            head(torch.ones(2, 8, dtype=torch.float64) * factor, labels)
        with pytest.raises(ValueError, match="longer than"):
            head.class_weights_from(torch.ones(2, 8, dtype=torch.float64) * factor, labels)


def test_class_means_that_the_weights_type_cannot_hold_are_refused() -> None:
    head = heads.Softmax(3, 8).half()
    with pytest.raises(ValueError, match=r"do not fit into torch.float16"):
        head.class_weights_from(1e5 * torch.ones(2, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize(("weight", "margin", "scale"), [(0.7, 0.4, 1000.0), (0.7, 1.9, 200.0), (0.5, 0.4, 1000.0)])
def test_spherefaces2_bias_is_found_where_its_terms_underflow(weight: float, margin: float, scale: float) -> None:
    found = balanced_offset(2, weight, margin, scale, 3.0)
    assert math.isfinite(found)
    # u p with p = e^(r (g + m)): (z - 1) / q for z > 1, 1 / sqrt(q) for z = 1
    z = weight / (1 - weight)
    expected = math.log(z - 1) + 2 * scale * margin if z > 1 else scale * margin
    assert found == pytest.approx(expected - scale * (2 * 0.5**3 - 1 + margin), rel=1e-9)


@EVERY_KIND
def test_a_collapsed_network_is_not_called_accurate(kind: Kind) -> None:
    head = kind.make(5, 8).eval()
    head(torch.zeros(4, 8), torch.tensor([0, 0, 1, 1]))
    assert head.last is not None
    assert head.last["accuracy"].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_labels_may_have_any_integer_type(dtype: torch.dtype) -> None:
    head, x = heads.ArcFace(4, 8), torch.ones(3, 8)
    labels = torch.tensor([0, 3, 1])
    assert head(x, labels.to(dtype)).item() == head(x, labels).item()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\)"):
        head(x, torch.tensor([0, 4, 1]).to(dtype))


def test_proxy_losses_have_no_target_curve() -> None:
    for head in (heads.NPT(3, 2), heads.CTriplet(3, 2), heads.CContrastive(3, 2)):
        with pytest.raises(ValueError, match="has no target logit to draw"):
            heads.target_curve(head, torch.tensor([0.5]))


def test_only_sub_center_arcface_has_several_vectors_for_a_class() -> None:
    with pytest.raises(TypeError, match="vectors_per_class"):
        heads.ArcFace(5, 8, vectors_per_class=3)  # type: ignore[call-arg]
    head = filled(heads.SubCenterArcFace(5, 8, sub_centers=3))
    assert head.weight.shape == (15, 8)
    with pytest.raises(ValueError, match="labels must lie in"):
        heads.SubCenterArcFace(5, 8).nearest_sub_center(torch.ones(1, 8), torch.tensor([5]))


def test_a_head_of_zero_weights_can_start_from_class_means() -> None:
    head = heads.ArcFace(2, 3)
    torch.nn.init.zeros_(head.weight)
    head.class_weights_from(torch.eye(3)[:2], torch.tensor([0, 1]))
    assert torch.allclose(head.weight, torch.eye(3)[:2])
