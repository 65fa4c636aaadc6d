from metricface.training.report import table


def test_a_row_shows_figures_with_their_error_and_a_dash_for_what_pairs_cannot_support() -> None:
    figures = {
        "accuracy": 0.9512,
        "accuracy_se": 0.0061,
        "tar_at_far_1e-1": 0.98,
        "tar_at_far_1e-2": 0.81,
        "tar_at_far_1e-3": None,
        "auc": 0.99,
        "eer": 0.05,
        "recall_at_1": 0.7,
        "map_at_r": 0.4,
    }
    head, row = table([("after softmax", "test", figures)]).splitlines()
    cells = ["0.951", "±0.006", "0.980", "0.810", "-", "0.990", "0.050", "0.700", "0.400"]
    assert row.split() == ["after", "softmax", "test", *cells]
    assert head.index("MAP@R") == row.index("0.400")
