import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metricface.heads import CosFace
from metricface.losses import TripletLoss
from metricface.miners import BatchHardMiner
from metricface.models import build
from metricface.models.layers import freeze_statistics, recompute_activations
from metricface.training.assemble import autocast
from metricface.training.update import apply_gradient, embed

CPU = torch.device("cpu")
plain = partial(autocast, torch.float32, CPU)
off = torch.amp.GradScaler("cpu", enabled=False)
LABELS = torch.arange(22) // 3


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = build("small", embedding_dim=8, channels=1, height=20, width=20, widths=[4, 6], units=[1, 1], **options)
    return made.double()


def images(number: int = 22) -> Tensor:
    return torch.randn(number, 1, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, objective: Any, chunk: int | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step, before the optimiser uses them up."""
    embedded = embed(model, images(), plain, chunk=chunk)
    loss = objective(embedded.embeddings)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    assert apply_gradient(loss, embedded, sgd, off)
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mined(embeddings: Tensor) -> Tensor:
    triplets = BatchHardMiner()(embeddings.detach(), LABELS)
    loss: Tensor = TripletLoss(margin=0.5)(embeddings, LABELS, triplets)
    return loss


def classified(embeddings: Tensor) -> Tensor:
    head = CosFace(8, 8, generator=torch.Generator().manual_seed(3)).double()
    loss: Tensor = head(embeddings, LABELS)
    return loss


@pytest.mark.parametrize("objective", [mined, classified])
@pytest.mark.parametrize("chunk", [1, 5, 8, 22, 100])
def test_chunks_give_the_loss_and_gradient_of_the_whole_batch_with_frozen_batch_norm(
    objective: Any, chunk: int
) -> None:
    model = network()
    model(images())  # statistics of its own
    freeze_statistics(model)
    expected_loss, expected = gradients(model, objective, None)
    loss, found = gradients(model, objective, chunk)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_dropout_draws_alike_in_both_passes_so_the_gradient_is_that_of_its_loss() -> None:
    model = network(dropout=0.4)
    freeze_statistics(model)
    torch.manual_seed(9)
    loss, found = gradients(model, classified, 4)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    torch.manual_seed(9)
    whole = classified(torch.cat([twin(part) for part in torch.split(images(), 4)]))
    whole.backward()  # type: ignore[no-untyped-call]
    assert float(whole) == pytest.approx(loss, rel=1e-6)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_global_generator_stands_where_one_pass_over_the_chunks_leaves_it() -> None:
    model = network(dropout=0.4)
    torch.manual_seed(9)
    gradients(model, classified, 4)
    after = torch.rand(3)
    torch.manual_seed(9)
    with torch.no_grad():
        for part in torch.split(images(), 4):
            model(part)
    assert torch.equal(torch.rand(3), after)


def test_batch_norms_in_training_take_each_chunk_once() -> None:
    model, twin = network(), network()
    gradients(model, mined, 8)
    with torch.no_grad():
        for part in torch.tensor_split(images(), math.ceil(len(images()) / 8)):
            twin(part)
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_a_frozen_network_is_asked_for_no_gradient() -> None:
    model = network().requires_grad_(False)
    head = CosFace(8, 8)
    embedded = embed(model, images(), plain, chunk=5)
    sgd = torch.optim.SGD(head.parameters(), lr=0.1)
    before = head.weight.detach().clone()
    assert apply_gradient(head(embedded.embeddings, LABELS), embedded, sgd, off)
    assert not torch.equal(head.weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_without_a_graph_changes_nothing() -> None:
    model = network()
    embedded = embed(model, images(), plain)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    assert apply_gradient(torch.zeros(()), embedded, sgd, off)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("chunk", [None, 6])
def test_a_clipped_gradient_has_the_norm_asked_for(chunk: int | None) -> None:
    model = network()
    embedded = embed(model, images(), plain, chunk=chunk)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    apply_gradient(100.0 * classified(embedded.embeddings), embedded, sgd, off, clip_norm=0.25)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [None, 6])
def test_scaling_changes_no_step_and_an_overflow_leaves_it_out(chunk: int | None, fused: bool) -> None:
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for made, scaled in ((model, scaler), (twin, off)):
        embedded = embed(made, images(), plain, chunk=chunk)
        sgd = torch.optim.SGD(made.parameters(), lr=0.1, fused=fused)
        assert apply_gradient(classified(embedded.embeddings), embedded, sgd, scaled, clip_norm=0.5)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    before = copy.deepcopy(dict(model.named_parameters()))
    embedded = embed(model, images(), plain, chunk=chunk)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    assert not apply_gradient(classified(embedded.embeddings) * torch.inf, embedded, sgd, scaler)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("name", ["small", "sphereface20", "mobilefacenet", "iresnet18"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_activations_computed_once_more_give_the_same_step(name: str, chunk: int | None) -> None:
    torch.manual_seed(0)
    model = build(name, embedding_dim=8, channels=1, height=20, width=20).double()
    twin = copy.deepcopy(model)
    recompute_activations(twin)
    copied = copy.deepcopy(twin)
    found = []
    for made in (model, twin, copied):
        embedded = embed(made, images(6), plain, chunk=chunk)
        loss = (embedded.embeddings * torch.arange(8)).square().sum()
        apply_gradient(loss, embedded, torch.optim.SGD(made.parameters(), lr=0.01, momentum=0.9), off)
        found.append(made.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)
        torch.testing.assert_close(found[2][name], value, msg=name)


def test_activations_computed_once_more_are_not_held() -> None:
    def held(made: nn.Module) -> int:
        """Numbers that the forward pass saves for the backward pass."""
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made(images())
        return saved

    model, twin = network(), network()
    recompute_activations(twin)
    assert held(twin) < 0.5 * held(model)
