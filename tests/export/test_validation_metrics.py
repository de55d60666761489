"""Errors of arrays and of predictions, against values that can be computed by hand."""

import numpy as np
import pytest

from rwkv_lab.export.validation_metrics import PredictionErrors, array_error


def test_errors_of_arrays():
    expected = np.array([[3.0, -4.0]], np.float32)
    found = array_error(expected + np.array([[0.0, 0.4]], np.float32), expected)
    assert (found.scale, found.not_finite) == (4, 0) and found.relative == pytest.approx(0.1)
    assert found.mean == pytest.approx(0.05) and 0.99 < found.cosine < 1
    assert array_error(expected, expected).cosine == pytest.approx(1)
    small = array_error(np.full((2, 2), 1e-3, np.float32), np.zeros((2, 2), np.float32))
    assert small.relative == pytest.approx(1e-3)  # the scale is 1 at least


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 1), np.float32), np.array([[0, np.nan]]), np.array([[np.inf, -np.inf]])]
)
def test_other_shapes_and_what_is_not_finite_are_infinitely_wrong(wrong):
    found = array_error(wrong, np.zeros((1, 2), np.float32))
    assert found.relative == float("inf") and found.not_finite == (~np.isfinite(wrong)).sum()


def test_predictions_of_two_tokens():
    p, q = np.log([[0.5, 0.5], [0.8, 0.2]]), np.log([[0.25, 0.75], [0.8, 0.2]])
    errors = PredictionErrors()
    errors.add(q + 7, p - 3, np.array([0]))  # the text ends behind the second position
    found = errors.result()
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.tokens == 2 and found.following == 1 and found.kl_percentiles == {}  # too few
    assert found.kl_mean == pytest.approx(kl / 2) and found.kl_largest == pytest.approx(kl)
    assert found.kl_standard_error == pytest.approx(kl / 2)  # of 0 and kl
    assert found.top1 == 1  # what is chosen in the first position is as likely as the other
    assert found.perplexity == pytest.approx(2) and found.perplexity_ratio == pytest.approx(2)
    assert found.probability_error_rms == pytest.approx(0.25)


def test_percentiles_and_pieces():
    draw = np.random.default_rng(0)
    p, ids = draw.normal(size=(150, 11)), draw.integers(0, 11, 150)
    q = p + 0.01 * draw.normal(size=p.shape)
    q[7, 3], p[7, 3] = 9, -9  # one position is far off
    whole, parts = PredictionErrors(), PredictionErrors()
    whole.add(q, p, ids)
    for at in range(0, 150, 29):
        parts.add(q[at : at + 29], p[at : at + 29], ids[at : at + 29])
    found, other = whole.result(), parts.result()
    assert found.kl_percentiles == pytest.approx(other.kl_percentiles)
    assert vars(found) | {"kl_percentiles": 0} == pytest.approx(vars(other) | {"kl_percentiles": 0})
    assert found.kl_percentiles.keys() == {"50", "90", "95", "99", "99.9"}
    assert found.kl_percentiles["50"] < 1e-3 < found.kl_percentiles["99.9"] < found.kl_largest
    assert found.top1 == pytest.approx(149 / 150, abs=0.03) and found.top1_standard_error > 0
    assert found.log_probability_correlation > 0.9
