import json
import math

import numpy as np
import pytest

from modmoe.analysis.records import Matrix, MethodRecord, half_width, mean_matrices, summarise


def matrix(values: list[list[float]]) -> Matrix:
    rows, columns = np.shape(values)
    names = [str(i) for i in range(max(rows, columns))]
    return Matrix(np.array(values), "after task", "task", names[:rows], names[:columns])


def test_a_matrix_keeps_values_and_names():
    kept = Matrix(np.array([[1, 2]]), "task", "expert", ["a"], ["x", "y"])
    assert kept.values.dtype == np.float64
    assert kept.values.tolist() == [[1.0, 2.0]]
    assert (kept.row_names, kept.column_names) == (["a"], ["x", "y"])


@pytest.mark.parametrize(
    ("values", "rows", "columns", "message"),
    [
        ([1.0, 2.0], ["a"], ["b"], r"2-D values, got shape \(2,\)"),
        ([[1.0, 2.0]], ["a", "b"], ["c", "d"], "1 rows but row_names has 2 names"),
        ([[1.0, 2.0]], ["a"], ["c"], "2 columns but column_names has 1 names"),
    ],
)
def test_a_matrix_with_wrong_shapes_is_refused(values, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        Matrix(np.array(values), "row", "column", rows, columns)


def test_records_do_not_share_their_dictionaries():
    first, second = MethodRecord({}), MethodRecord({})
    first.series["loss"] = [1.0]
    assert second.series == {}


def test_summarise_takes_the_mean_and_keeps_the_order():
    per_seed = [
        {"pool": MethodRecord({"z": 0.5, "a": 1}), "control": MethodRecord({"z": 0.25})},
        {"control": MethodRecord({"z": 0.75}), "pool": MethodRecord({"a": 4, "z": 1.0})},
    ]
    summary = summarise(per_seed)
    # (0.5 + 1) / 2 = 0.75; (1 + 4) / 2 = 2.5; (0.25 + 0.75) / 2 = 0.5
    assert summary == {
        "pool": {"z": {"mean": 0.75, "seeds": [0.5, 1.0]}, "a": {"mean": 2.5, "seeds": [1.0, 4.0]}},
        "control": {"z": {"mean": 0.5, "seeds": [0.25, 0.75]}},
    }
    assert list(summary) == ["pool", "control"]
    assert list(summary["pool"]) == ["z", "a"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null(bad):
    summary = summarise([{"m": MethodRecord({"a": np.float32(1.0)})}, {"m": MethodRecord({"a": bad})}])
    text = json.dumps(summary, allow_nan=False)
    assert text == '{"m": {"a": {"mean": null, "seeds": [1.0, null]}}}'


def test_summarise_names_what_is_missing():
    with pytest.raises(ValueError, match="no seed"):
        summarise([])
    with pytest.raises(ValueError, match="method 'b' is missing in seed number 1"):
        summarise([{"a": MethodRecord({}), "b": MethodRecord({})}, {"a": MethodRecord({})}])
    with pytest.raises(ValueError, match="method 'b' is missing in seed number 0"):
        summarise([{"a": MethodRecord({})}, {"a": MethodRecord({}), "b": MethodRecord({})}])
    with pytest.raises(ValueError, match="metric 'x' of method 'a' is missing in seed number 0"):
        summarise([{"a": MethodRecord({})}, {"a": MethodRecord({"x": 1.0})}])


def test_mean_matrices_averages_each_element():
    per_seed = [
        {"m": MethodRecord({}, {"accuracy": matrix([[1.0, math.nan], [0.5, 0.8]])})},
        {"m": MethodRecord({}, {"accuracy": matrix([[0.5, math.nan], [0.0, 0.4]])})},
    ]
    mean = mean_matrices(per_seed)["m"]["accuracy"]
    # (1 + 0.5) / 2, (0.5 + 0) / 2, (0.8 + 0.4) / 2
    np.testing.assert_allclose(mean.values, [[0.75, math.nan], [0.25, 0.6]])
    assert mean.row_label == "after task"
    assert per_seed[0]["m"].matrices["accuracy"].values[0, 0] == 1.0


def test_matrices_of_different_shape_are_not_averaged():
    per_seed = [
        {"m": MethodRecord({}, {"routing": matrix([[1.0, 0.0]]), "only": matrix([[3.0]])})},
        {"m": MethodRecord({}, {"routing": matrix([[0.2, 0.3, 0.5]])})},
    ]
    means = mean_matrices(per_seed)["m"]
    assert means["routing"].values.tolist() == [[1.0, 0.0]]
    assert means["only"].values.tolist() == [[3.0]]


def test_half_width_is_student_t():
    # n = 2: t(0.975, 1) = 12.7062, s = sqrt(((0 - 1)^2 + (2 - 1)^2) / 1) = sqrt(2), s / sqrt(2) = 1
    assert half_width([0.0, 2.0]) == pytest.approx(12.7062, abs=1e-4)
    # n = 3: t(0.975, 2) = 4.30265, s = sqrt((1 + 0 + 1) / 2) = 1, s / sqrt(3) = 0.57735
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 * 0.57735, abs=1e-4)
    assert half_width([1.0]) is None
    assert half_width([1.0, 2.0, None]) is None
