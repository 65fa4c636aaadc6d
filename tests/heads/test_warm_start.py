import pytest
import torch

from metricface import heads
from metricface.heads.base import Head
from tests.heads.kinds import EVERY_KIND, Kind


def clusters() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator) * 3
    labels = torch.arange(60) % 6
    return centres[labels] + 0.3 * torch.randn(60, 8, generator=generator), labels


@EVERY_KIND
def test_a_head_started_from_class_means_classifies_well_separated_classes(kind: Kind) -> None:
    x, labels = clusters()
    head = kind.make(6, 8)
    assert head.class_weights_from(x, labels) == 0
    assert (head.logits(x).argmax(dim=1) == labels).all()
    assert torch.isfinite(head(x, labels))


@pytest.mark.parametrize("trained", [False, True])
def test_unit_heads_take_the_mean_direction_and_keep_the_length_of_trained_weights(trained: bool) -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-2.0, 0.0]])
    head = heads.CosFace(3, 2)
    with torch.no_grad():
        head.weight.mul_(500.0 if trained else 1.0)
    before = head.weight.detach().clone()
    assert head.class_weights_from(x, torch.tensor([0, 0, 1])) == 1
    length = before.norm(dim=1).mean()
    assert trained == (float(length) > 1.0)
    length = length if trained else torch.tensor(1.0)
    assert torch.allclose(head.weight[0], torch.tensor([0.5, 0.5]).sqrt() * length)  # each image counts alike
    assert torch.allclose(head.weight[1], torch.tensor([-1.0, 0.0]) * length)
    assert torch.equal(head.weight[2], before[2])  # without an image


def test_softmax_becomes_the_nearest_mean_classifier_and_keeps_what_has_no_image() -> None:
    x, labels = clusters()
    head = heads.Softmax(7, 8)
    assert head.class_weights_from(x, labels) == 1
    means = torch.stack([x[labels == c].mean(dim=0) for c in range(6)])
    assert head.bias is not None
    assert torch.allclose(head.weight[:6], means, atol=1e-6)
    assert torch.allclose(head.bias[:6], -0.5 * means.square().sum(dim=1), atol=1e-4)
    assert head.bias[6].item() == 0.0


def test_means_that_cancel_to_zero_are_no_direction_and_counted() -> None:
    head = heads.ArcFace(2, 2)
    before = head.weight.detach().clone()
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert head.class_weights_from(x, torch.tensor([0, 0, 1])) == 2
    assert torch.equal(head.weight, before)


def test_sub_centers_take_every_kth_image_and_share_where_there_are_fewer() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
    head = heads.SubCenterArcFace(2, 2, sub_centers=2)
    assert head.class_weights_from(x, torch.tensor([0, 0, 0, 1])) == 0
    unit = torch.nn.functional.normalize(head.weight)
    assert torch.allclose(unit, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("head", [heads.CosFace(3, 2), heads.Softmax(3, 2)], ids=lambda head: type(head).__name__)
def test_a_warm_start_refuses_what_training_refuses(head: Head) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        head.class_weights_from(torch.ones(2, 2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"floating \(batch, 2\)"):
        head.class_weights_from(torch.ones(2, 3), torch.tensor([0, 1]))
    assert head.class_weights_from(torch.empty(0, 2), torch.empty(0, dtype=torch.long)) == 3
