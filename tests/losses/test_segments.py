import math

import pytest
import torch

from metricface.losses.segments import as_sets, by_positive_pair, segment_logsumexp
from metricface.tuples import Pairs, Triplets


def test_each_segment_gets_the_log_sum_exp_of_its_values_and_an_empty_one_minus_infinity() -> None:
    values = torch.tensor([1.0, 900.0, -2.0, 900.0, -5000.0], dtype=torch.float64)
    found = segment_logsumexp(values, torch.tensor([2, 0, 2, 0, 4]), 5)
    both = math.log(math.exp(1.0) + math.exp(-2.0))
    assert found.tolist() == pytest.approx([900 + math.log(2), -math.inf, both, -math.inf, -5000.0])


def test_the_gradient_is_the_softmax_of_each_segment_and_finite_where_one_is_empty() -> None:
    values = torch.tensor([0.0, 3000.0, -3000.0, 1.0], dtype=torch.float64, requires_grad=True)
    found = segment_logsumexp(values, torch.tensor([0, 2, 2, 0]), 4)
    (grad,) = torch.autograd.grad(torch.where(found > -torch.inf, found, 0.0).sum(), values)
    share = 1 / (1 + math.e)
    assert grad.tolist() == pytest.approx([share, 1.0, 0.0, 1 - share])
    small = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segment = torch.tensor([1, 0, 1, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: segment_logsumexp(x, segment, 3), (small,))
    assert torch.autograd.gradgradcheck(lambda x: segment_logsumexp(x, segment, 3), (small,))


def test_no_values_and_no_segments_are_allowed_and_stay_in_the_graph() -> None:
    nothing = torch.empty(0, requires_grad=True)
    assert segment_logsumexp(nothing, torch.empty(0, dtype=torch.long), 2).tolist() == [-math.inf] * 2
    assert segment_logsumexp(nothing, torch.empty(0, dtype=torch.long), 0).requires_grad


def test_pairs_become_sets() -> None:
    pairs = Pairs(*(torch.tensor(c) for c in ([1, 0, 1, 1], [4, 2, 4, 0], [3, 3], [5, 5])))
    assert [column.tolist() for column in as_sets(pairs, 6)] == [[0, 1, 1], [2, 0, 4], [3], [5]]
    empty = torch.empty(0, dtype=torch.long)
    assert [column.tolist() for column in as_sets(Pairs(empty, empty, empty, empty), 0)] == [[]] * 4


def test_triplets_are_sorted_by_positive_pair_without_repetitions() -> None:
    triplets = Triplets(*torch.tensor([(2, 1, 4), (0, 1, 3), (2, 1, 3), (2, 0, 4), (2, 1, 4)]).unbind(1))
    found = by_positive_pair(triplets, 5)
    assert [column.tolist() for column in found] == [[0, 2, 2], [1, 0, 1], [0, 1, 2, 2], [3, 4, 3, 4]]
