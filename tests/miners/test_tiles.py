"""Tiles and blocks, against all pairs at once."""

import pytest
import torch
from torch import Tensor

from metricface.distances import Distance, pairwise
from metricface.identities import find_identities
from metricface.miners.kernels import Nearest
from metricface.miners.tiles import RUN, Tile, block_shape, candidates, exclude_same, tiles
from metricface.tuples import check_batch


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(tile: Tile) -> Tensor:
    """All blocks of a tile side by side, without the last one's padding."""
    blocks = [(block.start, block.sq_negative.clone()) for block in tile.blocks()]
    assert [start for start, _ in blocks] == [sum(b.shape[1] for _, b in blocks[:k]) for k in range(len(blocks))]
    assert all(block.shape[1] % RUN == 0 for _, block in blocks)
    whole = torch.cat([block for _, block in blocks], dim=1)
    number = len(tile.plan.references.rows)
    assert (whole[:, number:] == torch.inf).all()
    return whole[:, :number]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
@pytest.mark.parametrize("size", [50, 200])  # one block; several, and identities of more than a quarter of a block
@pytest.mark.parametrize("identities", [2, 5, 40])
def test_blocks_hold_every_squared_distance_once_and_infinity_where_there_is_no_negative(
    distance: Distance, dtype: torch.dtype, size: int, identities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metricface.miners.tiles.CPU_BLOCK", 4 * RUN)
    x, y = (torch.randn(n, 6, generator=seeded(n), dtype=dtype) for n in (11, size))
    labels, ref_labels = (torch.randint(identities, (n,), generator=seeded(n)) for n in (11, size))
    y[3], ref_labels[3] = x[2], labels[2]
    self_index = torch.full((11,), -1).index_fill(0, torch.tensor(2), 3)
    batch = check_batch(x, labels, y, ref_labels, self_index)
    found = find_identities(batch)
    expected = pairwise(x, y, "squared_euclidean") if distance != "cosine" else 2 * pairwise(x, y, "cosine")
    negatives = labels[:, None] != ref_labels
    pairs, numbers, anchors = [], [], []
    for tile in tiles(batch, found, distance, tile_rows=4):
        whole, negative = rows(tile), negatives[tile.anchors]
        assert torch.equal(whole.isfinite(), negative)
        torch.testing.assert_close(whole[negative], expected[tile.anchors][negative], atol=1e-5, rtol=1e-5)
        row, place = tile.is_positive.nonzero(as_tuple=True)
        torch.testing.assert_close(
            tile.sq_positive[row, place], expected[tile.anchors[row], tile.positive[row, place]], atol=1e-5, rtol=1e-5
        )
        chosen = tile.positive[:, :1]
        torch.testing.assert_close(
            tile.sq_distances(chosen), expected[tile.anchors].gather(1, chosen), atol=1e-5, rtol=1e-5
        )
        pairs += list(zip(tile.anchors[row].tolist(), tile.positive[row, place].tolist(), strict=True))
        numbers += tile.pair[row, place].tolist()
        anchors += tile.anchors.tolist()
        sizes, positives = found.size[tile.anchors], found.positives[tile.anchors]
        assert torch.equal(tile.is_same.sum(dim=1), sizes)
        assert (labels[tile.anchors, None] == ref_labels[tile.same])[tile.is_same].all()
        assert tile.depths == [int((positives > j).sum()) for j in range(int(positives.max()))]
        assert all((positives[:deep] > j).all() for j, deep in enumerate(tile.depths))
    same = ~negatives
    same[2, 3] = False
    every_pair = [(a, p) for a, p in same.nonzero().tolist() if negatives[a].any()]
    assert sorted(pairs) == every_pair
    order = [(a, p) for a, p in same.nonzero().tolist()]
    assert [order[number] for number in numbers] == pairs
    assert found.positives[anchors].tolist() == sorted(found.positives[anchors].tolist(), reverse=True)


def test_whole_rows_come_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metricface.miners.tiles.CPU_BLOCK", 4 * RUN)
    x, labels = torch.randn(300, 3, generator=seeded(0)), torch.arange(300) // 2
    batch = check_batch(x, labels)
    number = {
        whole: [
            len(list(tile.blocks())) for tile in tiles(batch, find_identities(batch), "euclidean", whole_rows=whole)
        ]
        for whole in (True, False)
    }
    assert set(number[True]) == {1}
    assert min(number[False]) > 1


def test_tiles_leave_out_anchors_without_a_positive_or_without_a_negative_unless_they_are_named() -> None:
    x, labels = torch.randn(6, 3, generator=seeded(0)), torch.tensor([5, 5, 5, 8, 9, 9])
    batch = check_batch(x, labels)
    identities = find_identities(batch)
    assert [tile.anchors.tolist() for tile in tiles(batch, identities, "euclidean")] == [[0, 1, 2, 4, 5]]
    named = list(tiles(batch, identities, "euclidean", torch.tensor([3, 4])))
    assert [tile.anchors.tolist() for tile in named] == [[4, 3]]
    alike = check_batch(x, labels * 0)
    assert list(tiles(alike, find_identities(alike), "euclidean")) == []


def test_an_identity_that_the_references_lack_makes_a_tile_without_positives() -> None:
    x, y = torch.randn(2, 3, generator=seeded(0)), torch.randn(5, 3, generator=seeded(1))
    batch = check_batch(x, torch.tensor([7, 7]), y, torch.arange(5))
    (tile,) = tiles(batch, find_identities(batch), "euclidean", torch.arange(2))
    assert tile.same.shape == tile.positive.shape == (2, 0)
    torch.testing.assert_close(rows(tile), pairwise(x, y, "squared_euclidean"), atol=1e-5, rtol=1e-5)


def test_candidates_of_a_search_are_a_block_like_any_other() -> None:
    x, labels = torch.randn(30, 3, generator=seeded(0)), torch.arange(30) // 3
    batch = check_batch(x, labels)
    (tile,) = tiles(batch, find_identities(batch), "euclidean")
    whole = rows(tile)
    order = whole.argsort(dim=1)
    found = order[:, 5:12].clone()  # 7 of them, not the closest, in a row with the anchor's identity and with gaps
    found[:, 3], found[2, 4] = tile.positive[:, 1], -1
    block = candidates(tile, found)
    assert block.sq_negative.shape == (30, RUN)
    expected = whole.gather(1, found.clamp_min(0))
    expected[:, 3], expected[2, 4] = torch.inf, torch.inf
    torch.testing.assert_close(block.sq_negative[:, :7], expected)
    assert (block.sq_negative[:, 7:] == torch.inf).all()
    nearest = Nearest(tile.anchors, torch.float32)
    nearest.see(block)
    assert torch.equal(nearest.column, expected.argmin(dim=1))


def test_zeros_may_be_written_over_an_anchors_own_identity() -> None:
    x, labels = torch.randn(200, 3, generator=seeded(0)), torch.arange(200) // 4
    batch = check_batch(x, labels)
    for tile in tiles(batch, find_identities(batch), "euclidean", tile_rows=50):
        for block in tile.blocks():
            values = block.sq_negative.clone()
            assert block.references is not None
            exclude_same(values, tile, block.start, block.references.labels, 0.0)
            expected = torch.where(block.sq_negative == torch.inf, 0.0, block.sq_negative)
            width = min(values.shape[1], 200 - block.start)
            assert torch.equal(values[:, :width], expected[:, :width])


@pytest.mark.parametrize("references", [0, 1, 63, 64, 65, 300, 8192, 65536, 10**6])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_hold_no_more_numbers_than_a_device_is_given_unless_rows_must_be_whole(
    references: int, device: str
) -> None:
    made, columns = block_shape(references, torch.device(device))
    limit = 1 << (19 if device == "cpu" else 26)
    assert made >= 1
    assert columns >= RUN
    assert columns % RUN == 0
    assert made * columns <= limit
    assert block_shape(references, torch.device(device), 1)[0] == 1
    assert block_shape(references, torch.device(device), whole_rows=True)[1] == max(1, references)
