"""Where the experts' rows are: one table of addresses and sizes, so that one launch reads every bank in place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NAMES = ("w_in", "b_in", "w_out", "b_out", "w_gate", "b_gate")
# hidden: each expert's H. live: 1 where it has gradients. Then, for the l-th live expert: its position, and the sum
# of H over the live experts before it, which says where its gradients go.
FIELDS = (*NAMES, "hidden", "live", "live_expert", "live_start")

_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a bank's tensor -> (key, table)


@dataclass(frozen=True)
class Bank:
    """Experts whose rows stand in the same tensors.

    Args:
        positions: of the experts, in ``pool.ids``.
        live: whether any of the tensors needs a gradient.
        tensors: row name -> (len(positions), ...), contiguous.
    """

    positions: tuple[int, ...]
    live: bool
    tensors: Mapping[str, Tensor]

    @property
    def hidden(self) -> int:
        return self.tensors["w_in"].shape[2]


def expert_table(banks: Sequence[Bank], num_experts: int) -> Tensor:
    """Addresses and sizes of all experts, on the banks' device, made without waiting for it.

    A table is made out of its key (the addresses, sizes and positions) and nothing else, so one that is kept cannot
    be wrong for a call with the same key. One is kept for each structure, and goes with it: it hangs, weakly, on a
    tensor of the newest live bank, which any change of structure replaces. While a CUDA graph is captured no copy from
    the host is allowed and a kept table could go before the graph does, so there it is made of arithmetic sequences
    on the device, in the graph's own memory.

    Args:
        banks: together they hold each expert once.
        num_experts: E.
    Returns:
        (len(FIELDS), E) int64; 0 where a field does not apply.
    """
    device = banks[0].tensors["w_in"].device
    if capturing(device):
        return from_sequences(table_rows(banks, num_experts), device)
    key = (
        num_experts,
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,  # whose work it waits for
        *((b.positions, b.live, b.hidden, *(t.data_ptr() for t in b.tensors.values())) for b in banks),
    )
    anchor = [bank for bank in banks if bank.live][-1:] or banks[-1:]
    tensor = anchor[0].tensors["w_in"]
    kept = _tables.get(tensor)
    if kept is None or kept[0] != key:
        kept = (key, from_host(table_rows(banks, num_experts), device))
        _tables[tensor] = kept
    return kept[1]


def capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table_rows(banks: Sequence[Bank], num_experts: int) -> list[list[int]]:
    """The table's numbers, a list for each of ``FIELDS``."""
    rows = {field: [0] * num_experts for field in FIELDS}
    for bank in banks:
        for name, tensor in bank.tensors.items():
            start, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
            for index, position in enumerate(bank.positions):
                rows[name][position] = start + index * step
        for position in bank.positions:
            rows["hidden"][position] = bank.hidden
            rows["live"][position] = int(bank.live)
    live = [(position, bank.hidden) for bank in banks if bank.live for position in bank.positions]
    rows["live_expert"][: len(live)] = [position for position, _ in live]
    rows["live_start"][: len(live)] = list(accumulate((hidden for _, hidden in live[:-1]), initial=0))[: len(live)]
    return list(rows.values())


def from_host(rows: list[list[int]], device: torch.device) -> Tensor:
    """One copy, which the host does not wait for."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def from_sequences(rows: list[list[int]], device: torch.device) -> Tensor:
    """The same without a copy: rows of one bank are equally far apart, so a few sequences make the table."""
    table = torch.empty(len(rows), len(rows[0]), dtype=torch.int64, device=device)
    for row, values in zip(table, rows, strict=True):
        for begin, length, step in sequences(values):
            part = row[begin : begin + length]
            if step:
                torch.arange(values[begin], values[begin] + length * step, step, out=part)
            else:
                part.fill_(values[begin])
    return table


def sequences(values: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, length, step) of the longest arithmetic sequences that the values fall into, from the left."""
    begin = 0
    while begin < len(values):
        end = begin + 1
        step = values[end] - values[begin] if end < len(values) else 0
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        yield begin, end - begin, step
        begin = end
