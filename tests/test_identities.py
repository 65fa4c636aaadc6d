"""Where identities lie, against loops over all pairs of labels."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metricface.identities import find_identities, positive_pairs
from metricface.tuples import check_batch
from tests import oracles

VALUES = [-7, 0, 3, 2**24, 2**24 + 1, 2**40]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_identities_and_pairs_are_those_of_a_loop_over_all_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, ref_labels = rng.choice(VALUES, int(rng.integers(0, 9))), rng.choice(VALUES, int(rng.integers(0, 30)))
    self_index = np.full(len(labels), -1)
    for i, label in enumerate(labels):
        equal = np.flatnonzero(ref_labels == label)
        if len(equal) and rng.integers(2):
            self_index[i] = rng.choice(equal)
    sides = [torch.from_numpy(a) for a in (labels, ref_labels, self_index)]
    batch = check_batch(torch.zeros(len(labels), 2), sides[0], torch.zeros(len(ref_labels), 2), sides[1], sides[2])
    found = find_identities(batch)
    anchors, positives = positive_pairs(batch, found)
    expected = [oracles.positives(i, labels, ref_labels, self_index) for i in range(len(labels))]
    assert list(zip(anchors.tolist(), positives.tolist(), strict=True)) == [
        (i, j) for i, row in enumerate(expected) for j in row
    ]
    assert found.positives.tolist() == [len(row) for row in expected]
    assert found.negatives.tolist() == [len(oracles.negatives(i, labels, ref_labels)) for i in range(len(labels))]
    assert found.pairs == sum(map(len, expected))
    assert found.first_pair.tolist() == [sum(map(len, expected[:i])) for i in range(len(labels))]
    for i, label in enumerate(labels):
        run = slice(int(found.first[i]), int(found.first[i] + found.size[i]))
        assert found.by_label[run].tolist() == np.flatnonzero(ref_labels == label).tolist()
