"""Patterns of blocks by hand, and what a model holds besides experts."""

import pytest

from modmoe.vision import dense_parts, moe_layers, select_blocks


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [
        ("last-2", 12, (9, 11)),  # V-MoE's Last-2
        ("last-2", 5, (1, 3)),  # odd positions of 0..4
        ("every-2", 12, (1, 3, 5, 7, 9, 11)),
        ("every-3", 8, (2, 5)),
        ("every-1", 3, (0, 1, 2)),
        ("all", 3, (0, 1, 2)),
        ([3, 0], 4, (0, 3)),
        (range(2, 4), 4, (2, 3)),
    ],
)
def test_patterns(blocks, depth, expected):
    assert select_blocks(blocks, depth) == expected


@pytest.mark.parametrize("blocks", ["first-2", "last", "last-x", "every--2", "", "ALL", "last-2 "])
def test_an_unknown_pattern(blocks):
    with pytest.raises(ValueError, match=r"unknown block pattern .*'all', 'last-n' or 'every-n'"):
        select_blocks(blocks, 12)


@pytest.mark.parametrize("blocks", ["last-0", "every-0", "last-3", "every-5"])
def test_a_pattern_that_does_not_fit(blocks):
    with pytest.raises(ValueError, match="does not fit a model of 4 blocks, of which 2 are odd"):
        select_blocks(blocks, 4)


@pytest.mark.parametrize("blocks", [[], [4], [-1], [1, 1]])
def test_positions_that_are_none(blocks):
    with pytest.raises(ValueError, match=r"different positions in \[0, 4\)"):
        select_blocks(blocks, 4)


def test_layers_and_the_parts_without_a_pool(build):
    model = build("vmoe")
    assert list(moe_layers(model)) == ["blocks.1.mlp", "blocks.3.mlp"]
    parts = dense_parts(model)
    assert parts == [
        "patch_embed",
        "blocks.0",
        *(f"blocks.1.{part}" for part in ("norm1", "attn", "norm2")),
        "blocks.2",
        *(f"blocks.3.{part}" for part in ("norm1", "attn", "norm2")),
        "norm",
    ]
    # all but the experts' rows and the head
    named = {name for name, _ in model.named_parameters()}
    covered = {name for name in named if any(name.startswith(f"{part}.") for part in parts)}
    assert all(".pool." in name or name.startswith("head.") for name in named - covered)
    assert "head" in dense_parts(model, without=())


def test_the_parts_of_other_routers_and_networks(build):
    assert all("pool" not in name for name in dense_parts(build("soft")))
    assert dense_parts(build("conv"))[:3] == ["stem", "stages.0.0", "stages.0.1.norm"]
