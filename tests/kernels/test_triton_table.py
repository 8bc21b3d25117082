"""The host's part of the triton backend: the table of addresses and the sizes of tiles; no card, no Triton."""

import gc
from itertools import chain

import pytest
import torch
from torch import Tensor

from modmoe.kernels import triton_launch, triton_table
from modmoe.kernels.triton_launch import FEW_ROWS, TILES, architecture, choose_tiles, fewer_rows, precision, usable
from modmoe.kernels.triton_table import FIELDS, Bank, expert_table, from_sequences, sequences, table_rows


def bank(positions: tuple[int, ...], live: bool, hidden: int) -> Bank:
    n = len(positions)
    shapes = {"w_in": (n, 3, hidden), "b_in": (n, hidden), "w_out": (n, hidden, 2), "b_out": (n, 2)}
    return Bank(positions, live, {name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.fixture
def banks() -> list[Bank]:
    return [bank((0, 3), False, 4), bank((4, 1), True, 5), bank((2,), True, 7)]


def field(table: Tensor, name: str) -> list[int]:
    return table[FIELDS.index(name)].tolist()


def test_the_table_by_hand(banks):
    table = expert_table(banks, 5)
    assert table.shape == (len(FIELDS), 5)
    first, second, third = (b.tensors["w_in"].data_ptr() for b in banks)
    # rows of 3 x 4 and 3 x 5 numbers of 4 bytes; experts 0 to 4: first bank, second, third, first, second
    assert field(table, "w_in") == [first, second + 60, third, first + 48, second]
    assert field(table, "b_out")[3] == banks[0].tensors["b_out"].data_ptr() + 8
    assert field(table, "w_gate") == [0] * 5
    assert field(table, "hidden") == [4, 5, 7, 4, 5]
    assert field(table, "live") == [0, 1, 1, 0, 1]
    # live experts in the order of the banks: 4 and 1 of H 5, then 2: they begin at 0, 5 and 10
    assert field(table, "live_expert")[:3] == [4, 1, 2]
    assert field(table, "live_start")[:3] == [0, 5, 10]


def test_a_table_is_kept_while_nothing_changes(banks):
    table = expert_table(banks, 5)
    assert expert_table(banks, 5) is table
    moved = [*banks[:2], bank((2,), True, 7)]
    other = expert_table(moved, 5)
    assert field(other, "w_in")[2] == moved[2].tensors["w_in"].data_ptr()
    frozen = [*banks[:2], Bank((2,), False, banks[2].tensors)]
    assert field(expert_table(frozen, 5), "live") == [0, 1, 0, 0, 1]


def test_a_table_goes_with_its_structure(banks):
    gc.collect()
    before = len(triton_table._tables)
    grown = [*banks, bank((5,), True, 7)]
    expert_table(grown, 6)
    assert len(triton_table._tables) == before + 1
    expert_table([*banks, Bank((5,), True, grown[3].tensors | {"b_out": torch.zeros(1, 2)})], 6)
    assert len(triton_table._tables) == before + 1  # the older one went
    del grown
    gc.collect()
    assert len(triton_table._tables) == before


def test_a_table_of_sequences_is_the_same(banks):
    rows = table_rows(banks, 5)
    assert from_sequences(rows, torch.device("cpu")).tolist() == rows


@pytest.mark.parametrize(
    "values",
    [[7], [2**47, 2**47 + 48, 2**47 + 96], [5, 5, 5, 9], [3, 2, 1, 10, 20], [1, 2, 4, 8], [2**47 + 16, 2**47]],
)
def test_sequences_put_together_are_the_values(values):
    parts = [[values[begin] + i * step for i in range(length)] for begin, length, step in sequences(values)]
    assert list(chain(*parts)) == values
    assert from_sequences([values], torch.device("cpu")).tolist() == [values]


def test_rows_of_one_bank_are_one_sequence():
    assert len(list(sequences([100, 148, 196, 244]))) == 1


def test_few_assignments_get_lower_tiles():
    tiles = choose_tiles(90, 2)
    assert fewer_rows(tiles, 32 * 8, 8).block_m == FEW_ROWS
    assert fewer_rows(tiles, 32 * 8 + 1, 8) == tiles
    assert fewer_rows(choose_tiles(0, 4), 1, 8) == choose_tiles(0, 4)  # the interpreter's are lower already


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_architectures(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(torch.device("cuda")) == expected
    assert all((expected, size) in TILES for size in (2, 4))


def test_where_the_kernels_run(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton_launch, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert all(usable(cuda, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not usable(cuda, torch.float64)
    assert not usable(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not usable(cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not usable(cuda, torch.float32)


def test_tf32_only_where_it_is_allowed():
    assert precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
