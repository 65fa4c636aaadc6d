"""From one miner to another over steps."""

import pytest
import torch
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor

from metricface.miners import BatchHardMiner, CurriculumMiner, SemiHardMiner
from metricface.tuples import Triplets


def batch(people: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(people, 8, generator=generator).repeat_interleave(3, 0)
    return centres + torch.randn(3 * people, 8, generator=generator), torch.arange(people).repeat_interleave(3)


def rows(triplets: Triplets) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in triplets), strict=True))


def curriculum(start: int = 2, end: int = 6) -> CurriculumMiner:
    generator = torch.Generator().manual_seed(1)
    return CurriculumMiner(
        SemiHardMiner(fallback="hardest"), BatchHardMiner(), start=start, end=end, generator=generator
    )


def test_anchors_move_from_one_miner_to_the_other_in_the_share_that_has_passed() -> None:
    x, labels = batch(people=400)
    semi_hard, batch_hard = rows(SemiHardMiner(fallback="hardest")(x, labels)), rows(BatchHardMiner()(x, labels))
    miner = curriculum()
    shares = []
    for step in range(9):
        assert miner.share == min(1.0, max(0.0, (step - 2) / 4))
        found = rows(miner(x, labels))
        anchors = [a for a, _, _ in found]
        assert anchors == sorted(anchors)
        # A semi-hard anchor has two triplets, one for each positive.
        hard = {a for a in range(len(x)) if anchors.count(a) == 1}
        assert [t for t in found if t[0] in hard] == [t for t in batch_hard if t[0] in hard]
        assert [t for t in found if t[0] not in hard] == [t for t in semi_hard if t[0] not in hard]
        shares.append(len(hard) / len(x))
    assert shares[:3] == [0.0, 0.0, 0.0]
    assert shares[6:] == [1.0, 1.0, 1.0]
    assert all(abs(share - expected) < 0.05 for share, expected in zip(shares[3:6], (0.25, 0.5, 0.75), strict=True))


def test_only_training_takes_steps_and_a_checkpoint_keeps_them() -> None:
    x, labels = batch()
    miner = curriculum()
    for _ in range(3):
        miner(x, labels)
    miner.eval()
    miner(x, labels)
    assert miner.steps == 3
    again = curriculum()
    again.load_state_dict(miner.state_dict())
    assert again.steps == 3
    assert again.share == 0.25


def test_references_reach_both_miners_with_self_index() -> None:
    x, labels = batch()
    miner = curriculum(start=0, end=2)
    miner.steps = 1
    found = miner(x, labels, x.clone(), labels.clone(), self_index=torch.arange(len(x)))
    assert len(found.anchor) > 0
    assert (found.anchor != found.positive).all()


def test_pmls_miners_take_part() -> None:
    x, labels = batch()
    miner = CurriculumMiner(pml_miners.TripletMarginMiner(), BatchHardMiner(), start=1, end=1)
    assert rows(miner(x, labels)) == sorted(rows(pml_miners.TripletMarginMiner()(x, labels)))
    assert rows(miner(x, labels)) == rows(BatchHardMiner()(x, labels))


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (4, 3), (0.5, 3), (0, None)])
def test_steps_that_mean_nothing_are_errors(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= end"):
        curriculum(start, end)


def test_a_miner_given_by_its_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="then must be a miner, such as"):
        CurriculumMiner(SemiHardMiner(), BatchHardMiner, start=0, end=1)  # type: ignore[arg-type]
