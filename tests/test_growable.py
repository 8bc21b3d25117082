"""Rows with owners: cohorts, frozen banks, names, order, books; every number by hand."""

import copy
import json

import pytest
import torch
from torch import nn

from modmoe import GrowableBuffer, GrowableParameter, Init, RowSpec

BOTH = pytest.mark.parametrize("kind", [GrowableParameter, GrowableBuffer])


def rows(*values: float) -> torch.Tensor:
    """Rows (len(values), 2): v becomes [v, v + 0.5]."""
    return torch.tensor([[value, value + 0.5] for value in values])


def banks(growable) -> dict[str, list]:
    """Bank name -> its values, in the order of the banks."""
    return {name: tensor.tolist() for name, tensor in growable.state_dict().items() if name != "_extra_state"}


def snapshot(module: nn.Module) -> tuple[dict, list[int]]:
    """All values with the books, and which tensor objects hold the parameters."""
    return {key: value.clone() for key, value in module.state_dict().items()}, [id(p) for p in module.parameters()]


def assert_unchanged(module: nn.Module, before: tuple[dict, list[int]]) -> None:
    values, identities = snapshot(module)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(values[key], before[0][key]) for key in values)
    assert identities == before[1]


# -- the life of a cohort --------------------------------------------------------------------------


@BOTH
def test_names_are_never_reused(kind):
    growable = kind((2,))
    growable.add([0, 1, 2], rows(0, 1, 2))
    assert banks(growable) == {"c0": [[0, 0.5], [1, 1.5], [2, 2.5]]}
    growable.freeze([1])  # c0 retires; what is left of it is c1
    assert banks(growable) == {"c1": [[0, 0.5], [2, 2.5]], "frozen_2": [[1, 1.5]]}
    growable.freeze([0])  # the bank grows at its end
    assert banks(growable) == {"c2": [[2, 2.5]], "frozen_2": [[1, 1.5], [0, 0.5]]}
    growable.unfreeze([1])
    assert banks(growable) == {"c2": [[2, 2.5]], "frozen_2": [[0, 0.5]], "c3": [[1, 1.5]]}
    growable.remove([1, 2])
    assert banks(growable) == {"frozen_2": [[0, 0.5]]}
    growable.add([3], rows(3))  # c0 to c3 are used up
    assert banks(growable) == {"frozen_2": [[0, 0.5]], "c4": [[3, 3.5]]}
    growable.unfreeze([0])  # nothing frozen: no bank
    assert banks(growable) == {"c4": [[3, 3.5]], "c5": [[0, 0.5]]}


def test_live_rows_are_parameters_and_frozen_rows_are_persistent_buffers():
    growable = GrowableParameter((2,))
    growable.add([0, 1], rows(0, 1))
    growable.freeze([0])
    assert [name for name, _ in growable.named_parameters()] == ["c1"]
    assert isinstance(growable.c1, nn.Parameter)
    assert not growable.frozen_2.requires_grad
    assert "frozen_2" in growable.state_dict()
    assert list(GrowableBuffer((2,)).parameters()) == []


@BOTH
def test_an_owner_with_rows_in_two_cohorts_keeps_their_order(kind):
    growable = kind(())
    growable.add([7, 7, 8], torch.tensor([10.0, 11.0, 20.0]))
    growable.add([8, 7], torch.tensor([21.0, 12.0]))

    def check():
        assert growable.stack([7]).tolist() == [10, 11, 12]
        assert growable.stack([8, 7]).tolist() == [20, 21, 10, 11, 12]
        assert growable.owner_positions([8, 7]) == [0, 0, 1, 1, 1]
        assert growable.row_counts() == {7: 3, 8: 2}

    check()
    growable.freeze([8])  # from both cohorts; the rest of each is a new one
    assert banks(growable) == {"c2": [10, 11], "c3": [12], "frozen_": [20, 21]}
    check()
    growable.freeze([7])  # the bank now holds them as they came
    assert banks(growable) == {"frozen_": [20, 21, 10, 11, 12]}
    check()
    growable.unfreeze([8])
    assert banks(growable) == {"frozen_": [10, 11, 12], "c4": [20, 21]}
    check()
    growable.add([8], torch.tensor([22.0]))
    assert growable.stack([8, 7]).tolist() == [20, 21, 22, 10, 11, 12]
    growable.freeze([8])  # rows 10, 11, 12, 20, 21, 22 in the bank; the late one stays 8's last
    growable.unfreeze([7, 8])
    assert growable.stack([8]).tolist() == [20, 21, 22]


def test_one_frozen_bank_for_each_row_shape():
    growable = GrowableParameter((2, None))
    growable.add([0], torch.zeros(1, 2, 3))
    growable.add([1, 2], torch.ones(2, 2, 5))
    growable.freeze([0, 2])
    shapes = {name: tuple(tensor.shape) for name, tensor in growable.state_dict().items() if name != "_extra_state"}
    assert shapes == {"frozen_2x3": (1, 2, 3), "c2": (1, 2, 5), "frozen_2x5": (1, 2, 5)}


def test_frozen_values_do_not_follow_the_tensor_they_came_from():
    growable = GrowableParameter((2,))
    growable.add([0, 1], rows(0, 1))
    retired = growable.c0
    growable.freeze([0])
    with torch.no_grad():
        retired.fill_(99.0)  # an optimizer that was not synced
    assert banks(growable) == {"c1": [[1, 1.5]], "frozen_2": [[0, 0.5]]}


def test_added_values_are_copied():
    values = rows(0, 1)
    growable = GrowableParameter((2,))
    growable.add([0, 1], values)
    values.zero_()
    assert banks(growable) == {"c0": [[0, 0.5], [1, 1.5]]}


@BOTH
def test_no_owner_is_no_change(kind):
    growable = kind((2,))
    growable.add([0], rows(0))
    before = snapshot(growable)
    growable.add([], rows()[:0].reshape(0, 2))
    growable.freeze([])
    growable.freeze([5])  # an expert without rows here
    growable.unfreeze([0])
    growable.remove([5])
    assert_unchanged(growable, before)


# -- reading ---------------------------------------------------------------------------------------


def test_a_whole_bank_is_read_without_a_copy():
    growable = GrowableParameter((2,))
    growable.add([0, 1], rows(0, 1))
    assert growable.stack([0, 1]) is growable.c0
    assert growable.stack([1, 0]).tolist() == [[1, 1.5], [0, 0.5]]
    growable.freeze([0, 1])
    assert growable.stack([0, 1]) is growable.frozen_2


def test_gradients_reach_the_rows_that_were_read():
    growable = GrowableParameter((2,))
    growable.add([0, 1, 2], rows(0, 1, 2))
    growable.add([3], rows(3))
    growable.freeze([1])
    (growable.stack([3, 1, 0]) * torch.tensor([[5.0], [6.0], [7.0]])).sum().backward()
    # read: row 3 of c1, row 1 of the frozen bank, row 0 of c2 (which holds 0 and 2)
    assert growable.c1.grad.tolist() == [[5, 5]]
    assert growable.c2.grad.tolist() == [[7, 7], [0, 0]]
    assert growable.frozen_2.grad is None


def test_stack_without_rows():
    assert GrowableParameter((2, 3)).stack([4]).shape == (0, 2, 3)
    with pytest.raises(ValueError, match=r"no rows for experts \[4\]"):
        GrowableParameter((None,)).stack([4])


def test_stack_of_different_shapes():
    growable = GrowableParameter((None,))
    growable.add([0], torch.zeros(1, 3))
    growable.add([1], torch.zeros(1, 4))
    with pytest.raises(ValueError, match="rows of different shapes"):
        growable.stack([0, 1])


# -- drawing ---------------------------------------------------------------------------------------


def test_draw_by_hand():
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    uniform = RowSpec((3, "hidden"), Init("uniform", fan_in="hidden")).draw(500, {"hidden": 4}, like)
    assert uniform.shape == (500, 3, 4)
    assert uniform.dtype == torch.float64
    assert 0.49 < uniform.abs().max() <= 0.5  # 1 / sqrt(4)
    normal = RowSpec((10,), Init("normal", std=0.1)).draw(1000, {}, like)
    assert normal.std().item() == pytest.approx(0.1, rel=0.05)
    assert RowSpec((2,), Init("constant", value=3.0)).draw(1, {}, like).tolist() == [[3, 3]]
    assert RowSpec((3, "hidden")).template() == (3, None)


# -- retired tensors -------------------------------------------------------------------------------


def test_retired_tensors_are_known_while_somebody_holds_them():
    growable = GrowableParameter((2,))
    growable.add([0, 1], rows(0, 1))
    first = growable.c0
    growable.freeze([0])
    growable.freeze([1])  # nobody holds c1
    (entry,) = growable.retired()
    assert entry[0] is first
    assert [row.owner for row in entry[1]] == [0, 1]
    copied, first_copy = copy.deepcopy((growable, first))
    assert copied.retired()[0][0] is first_copy
    del entry, first
    assert growable.retired() == []


# -- statistics ------------------------------------------------------------------------------------


def test_write_by_hand():
    growable = GrowableBuffer(())
    growable.add([0, 1], torch.tensor([1.0, 2.0]))
    growable.add([0], torch.tensor([3.0]))
    growable.write(0, torch.tensor([10.0, 30.0]))
    assert banks(growable) == {"c0": [10, 2], "c1": [30]}


def test_a_clone_that_shares_the_buffers_does_not_write_into_the_base():
    growable = GrowableBuffer(())
    growable.add([0, 1], torch.tensor([1.0, 2.0]))
    clone = copy.copy(growable)  # what learn2learn's clone_module makes of buffers
    clone.__dict__ = {**growable.__dict__, "_buffers": growable._buffers.copy()}
    clone.write(0, torch.tensor([9.0]))
    assert clone.stack([0, 1]).tolist() == [9, 2]
    assert growable.stack([0, 1]).tolist() == [1, 2]


def test_frozen_statistics_are_never_written():
    growable = GrowableBuffer(())
    growable.add([0, 1], torch.tensor([1.0, 2.0]))
    growable.freeze([0])
    before = snapshot(growable)
    with pytest.raises(ValueError, match="expert 0 is frozen"):
        growable.write(0, torch.tensor([5.0]))
    with pytest.raises(ValueError, match="expert 1 has 1 rows here, got 2"):
        growable.write(1, torch.tensor([5.0, 6.0]))
    with pytest.raises(ValueError, match=r"rows of shape \(\) are needed"):
        growable.write(1, torch.zeros(1, 1))
    assert_unchanged(growable, before)


# -- errors of add ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("owners", "values", "match"),
    [
        ([2], torch.zeros(1, 3), r"rows of shape \(2,\) are needed, got \(3,\)"),
        ([2], torch.zeros(2), r"rows of shape \(2,\) are needed"),
        ([2], torch.tensor(0.0), r"rows of shape \(2,\) are needed"),
        ([2, 3], torch.zeros(1, 2), "2 owners for 1 rows"),
        ([0], torch.zeros(1, 2), r"experts \[0\] are frozen"),
        ([1, 0], torch.zeros(2, 2), r"experts \[0\] are frozen"),
    ],
)
def test_add_refuses_and_changes_nothing(kind, owners, values, match):
    growable = kind((2,))
    growable.add([0, 1], rows(0, 1))
    growable.freeze([0])
    before = snapshot(growable)
    with pytest.raises(ValueError, match=match):
        growable.add(owners, values)
    assert_unchanged(growable, before)


# -- saving and loading ----------------------------------------------------------------------------


def grown(kind=GrowableParameter):
    growable = kind((2,))
    growable.add([0, 1, 1, 2], rows(0, 1, 11, 2))
    growable.freeze([1])
    growable.add([3], rows(3))
    return growable


@BOTH
def test_load_rebuilds_banks_and_counters(kind):
    saved, fresh = grown(kind), kind((2,))
    fresh.add(list(range(9)), rows(*range(9)))  # a larger one than the saved one
    fresh.load_state_dict(saved.state_dict())
    assert banks(fresh) == banks(saved)
    for growable in (saved, fresh):  # and both go on alike: c0 was split into c1, the next one is c3
        growable.freeze([3])
        growable.add([4, 2], rows(4, 22))
        assert set(banks(growable)) == {"c1", "frozen_2", "c3"}
    assert torch.equal(fresh.get_extra_state(), saved.get_extra_state())


def test_load_of_the_same_structure_keeps_the_tensors():
    growable = grown()
    state = copy.deepcopy(growable.state_dict())
    held = list(growable.parameters())
    with torch.no_grad():
        held[0].zero_()
    growable.load_state_dict(state)
    assert all(a is b for a, b in zip(growable.parameters(), held, strict=True))
    assert growable.stack([0]).tolist() == [[0, 0.5]]


def edited(state: dict, **changes) -> dict:
    """A state dict with another book."""
    book = json.loads(bytes(state["_extra_state"].tolist()))
    book.update(changes)
    return {**state, "_extra_state": torch.tensor(list(json.dumps(book).encode()), dtype=torch.uint8)}


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("corrupt", "match"),
    [
        (lambda s: edited(s, version=99), "has format 99"),
        (lambda s: edited(s, version="new"), "cannot be read"),
        (lambda s: edited(s, banks=None), "cannot be read"),
        (lambda s: edited(s, banks={"c1": [[0]]}), "cannot be read"),
        (lambda s: edited(s, banks={"forward": [[0, 0]]}), "cannot be read"),
        (lambda s: edited(s, next_row=None), "cannot be read"),
        (lambda s: {**s, "_extra_state": torch.tensor([1, 2, 3], dtype=torch.uint8)}, "cannot be read"),
        (lambda s: {**s, "_extra_state": torch.tensor([0.5])}, "cannot be read"),
        (lambda s: {**s, "_extra_state": None}, "cannot be read"),
        (lambda s: without(s, "c1"), "names the bank 'c1' but does not hold it"),
        (lambda s: {**s, "c1": torch.zeros(2, 3)}, r"rows of shape \(2,\) are needed, got \(3,\)"),
        (lambda s: {**s, "c1": torch.zeros(1, 2)}, "does not have the 2 rows"),
    ],
)
def test_a_state_dict_that_cannot_be_loaded_changes_nothing(corrupt, match):
    growable = GrowableParameter((2,))
    growable.add([5], rows(5))
    before = snapshot(growable)
    with pytest.raises(ValueError, match=match):
        growable.load_state_dict(corrupt(dict(grown().state_dict())))
    assert_unchanged(growable, before)
