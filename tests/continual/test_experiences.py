"""What an experience says of its task."""

from types import SimpleNamespace

import pytest

from modmoe.continual.experiences import ends_task, starts_task, task_label


def experience(labels, others=(), **attributes):
    stream = [SimpleNamespace(task_labels=other) for other in others]
    return SimpleNamespace(task_labels=labels, origin_stream=stream, **attributes)


@pytest.mark.parametrize(
    ("labels", "others", "expected"),
    [
        ([1, 1], [[0], [1]], 1),
        ([0], [[0], [1]], 0),
        ([0], [[0], [0]], None),  # what Avalanche says where nobody has given labels
        ([0], [], None),
        ([7], [[7]], 7),
        ([7], [], 7),
        ([0, 1], [[0, 1]], None),  # a mixture is of no task
        ([], [[]], None),
        (None, [], None),
    ],
)
def test_task_label(labels, others, expected):
    assert task_label(experience(labels, others)) == expected


def test_boundaries_are_read_only_where_they_are_shown():
    whole = SimpleNamespace()
    assert (starts_task(whole), ends_task(whole)) == (True, True)
    middle = experience([], is_first_subexp=False, is_last_subexp=False)
    assert (starts_task(middle), ends_task(middle)) == (False, False)
    hidden = experience([], is_first_subexp=True, is_last_subexp=True, access_task_boundaries=False)
    assert (starts_task(hidden), ends_task(hidden)) == (False, False)
