import math

import numpy as np
import pytest

from metricface.choices import check_choice, is_count, is_number


def test_numbers_are_real_and_finite_unless_said_otherwise() -> None:
    assert all(map(is_number, (0, -1.5, np.float32(2), np.int64(3))))
    assert not any(map(is_number, (math.nan, math.inf, -math.inf, True, "1", None, 1j, np.True_, [1.0])))
    assert is_number(math.inf, infinite=True)
    assert not is_number(math.nan, infinite=True)


def test_counts_are_whole_numbers_from_one() -> None:
    assert all(map(is_count, (1, 7, np.int32(2))))
    assert not any(map(is_count, (0, -1, 2.0, True, "3", None, np.float64(4))))


def test_a_wrong_word_is_an_error_that_lists_the_right_ones() -> None:
    check_choice("colour", "red", ("red", "green"))
    with pytest.raises(ValueError, match="colour='blue' is unknown; use one of 'red', 'green'"):
        check_choice("colour", "blue", ("red", "green"))
