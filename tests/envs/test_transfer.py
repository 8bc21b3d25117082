"""Forgetting and transfer, each from a small matrix by hand."""

import pytest
from modmoe_envs import (
    average_performance,
    backward_transfer,
    forgetting,
    forgetting_by_task,
    forward_transfer,
    learning_transfer,
)

MATRIX = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.7, 0.9]]


def test_average_performance():
    assert average_performance(MATRIX) == pytest.approx((0.5 + 0.7 + 0.9) / 3)


def test_forgetting():
    assert forgetting_by_task(MATRIX) == pytest.approx([0.9 - 0.5, 0.8 - 0.7, 0.0])
    assert forgetting(MATRIX) == pytest.approx(0.5 / 3)


def test_backward_transfer():
    assert backward_transfer(MATRIX) == pytest.approx((-0.4 - 0.1) / 2)
    assert backward_transfer(MATRIX) == pytest.approx(-3 / 2 * forgetting(MATRIX))


def test_forward_transfer():
    # Task 1 before its training: .2; task 2: .3. Untrained: .1 and .25.
    assert forward_transfer(MATRIX, [9.0, 0.1, 0.25]) == pytest.approx((0.1 + 0.05) / 2)


def test_learning_transfer():
    # Areas (.25 + .75)/2 = .5 and (0 + .5)/2 = .25: (.5 - .25) / (1 - .25).
    assert learning_transfer([0.0, 0.5, 1.0], [0.0, 0.0, 1.0]) == pytest.approx(1 / 3)
    # Returns with -2 at best: (-7 + 10) / (-2 + 10).
    assert learning_transfer([-10, -4], [-12, -8], best=-2) == pytest.approx(3 / 8)
    assert learning_transfer([1, 1], [0, 1]) == 1.0


def test_one_task_forgets_nothing():
    assert forgetting([[0.3]]) == 0.0


def test_bad_input():
    for function in (average_performance, forgetting, backward_transfer):
        with pytest.raises(ValueError, match=r"\(T, T\), tasks trained by tasks evaluated, not \(1, 2\)"):
            function([[1, 2]])
    for value in ([], 3.0):
        with pytest.raises(ValueError, match="matrix must be"):
            forgetting(value)
    with pytest.raises(ValueError, match="two tasks at least"):
        backward_transfer([[1.0]])
    with pytest.raises(ValueError, match=r"baseline must have shape \(3,\)"):
        forward_transfer(MATRIX, [0.1, 0.2])
    with pytest.raises(ValueError, match="two or more numbers"):
        learning_transfer([1.0], [0.0, 0.5])
    with pytest.raises(ValueError, match="must be below best=1"):
        learning_transfer([0.5, 0.5], [1.0, 1.0])
