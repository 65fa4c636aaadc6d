"""Where each of the traps that make an implementation another function than its paper's is tested.

Numbers as in the project's formula sheet; each names the tests that would fail. And every worked example of a loss or a
head is in some test.
"""

import ast
import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

TRAPS: dict[int, tuple[str, list[str]]] = {
    1: ("the root at 0", ["test_distances.py::test_identical_rows_are_at_distance_zero_with_gradient_zero"]),
    2: ("squared or not", ["losses/test_triplet.py::test_squared_distances_give_other_values_than_plain_ones"]),
    3: ("PML's contrastive", ["losses/test_contrastive.py::test_pmls_loss_of_the_same_name_is_another_function"]),
    4: ("means", ["losses/test_triplet.py::test_batch_all_has_the_values_of_hermans_under_each_meaning_of_mean"]),
    5: ("active ones", ["losses/test_triplet.py::test_batch_all_has_the_values_of_hermans_under_each_meaning_of_mean"]),
    6: ("soft margin", ["losses/test_triplet.py::test_soft_margin_has_no_margin"]),
    7: (
        "semi-hard without a candidate",
        [
            "miners/test_in_batch.py::test_semi_hard_is_the_closest_negative_of_each_window_or_what_the_fallback_says",
            "miners/test_in_batch.py::test_an_infinite_margin_with_the_easiest_fallback_is_tensorflow_addons",
        ],
    ),
    8: ("random violating", ["miners/test_in_batch.py::test_a_random_hard_negative_violates_the_margin_of_its_pair"]),
    9: (
        "bool + bool",
        ["losses/test_margin_based.py::test_a_triplet_with_both_pairs_active_counts_twice_in_the_divisor"],
    ),
    10: ("nu", ["losses/test_margin_based.py::test_class_betas_and_nu_give_the_published_value_and_gradient"]),
    11: ("row maxima", ["miners/test_in_batch.py::test_a_near_duplicate_negative_costs_no_other_anchor_its_triplets"]),
    12: ("angular", ["losses/test_angular.py::test_negatives_are_normalised_too_which_pmls_are_not"]),
    13: ("N-pair", ["losses/test_n_pair.py::test_nothing_is_normalised_unlike_in_pml_by_default"]),
    14: (
        "circle",
        [
            "losses/test_circle.py::test_weights_have_no_gradient",
            "losses/test_circle.py::test_one_loss_of_all_unordered_pairs_has_the_published_value_and_is_another_loss",
        ],
    ),
    15: ("centre loss", ["losses/test_center.py::test_sandbergs_variant_is_another_loss_and_another_step"]),
    16: ("range loss", ["losses/test_range.py::test_distances_are_squared_and_the_weights_not_exchanged"]),
    17: ("NPT", ["heads/test_margins.py::test_npt_masks_the_own_class_with_minus_infinity_and_not_zero"]),
    18: (
        "SphereFace's lambda",
        ["heads/test_margins.py::test_lambda_falls_as_published_and_is_counted_before_it_is_used"],
    ),
    19: ("theta + m > pi", ["heads/test_margins.py::test_arcface_beyond_pi_follows_its_three_conventions"]),
    20: ("no_grad", ["heads/test_margins.py::test_arcface_differentiates_its_margin_unless_it_is_detached"]),
    21: ("m2 and m3", ["heads/test_margins.py::test_combined_margin_does_not_drop_m2_where_m3_is_given"]),
    22: (
        "memory",
        [
            "miners/test_memory.py::test_a_full_memory_whose_last_label_is_zero_is_full",
            "miners/test_memory.py::test_the_queue_is_a_ring_where_the_authors_code_overwrites_its_end",
        ],
    ),
    23: (
        "ties of thresholds",
        [
            "evaluation/test_verification.py::test_spherefaces_example_finds_the_middle_of_the_gap",
            "evaluation/test_verification.py::test_facenets_fold_accuracies_come_out_of_the_same_folds_with_its_grid_and_tie_rule",
        ],
    ),
    24: ("nearest FAR", ["evaluation/test_verification.py::test_tar_at_far_is_conservative_on_the_published_example"]),
}


@pytest.mark.parametrize("number", range(1, 25))
def test_every_trap_has_tests_of_its_own(number: int) -> None:
    _, tests = TRAPS[number]
    assert tests
    for test in tests:
        path, name = test.split("::")
        tree = ast.parse((TESTS / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_worked_example_of_a_loss_or_a_head_is_in_some_test() -> None:
    texts = [path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    names = [name for name in json.loads((TESTS / "vectors.json").read_text()) if name[0] in "AB"]
    assert len(names) > 50
    assert [name for name in names if not any(f'"{name}"' in text for text in texts)] == []
