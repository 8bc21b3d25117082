"""SMEAR by the text so far."""

import pytest
import torch
from torch.testing import assert_close

from modmoe import ExpertPool, LoryRouter, MLPExpert, MoELayer
from modmoe.language.attention import BlockCache, Step
from modmoe.language.merging import PrefixSmearRouter, merge_step


def test_sources_by_hand():
    # segments of 2: [1, 3], [5, 7], [9]; the first reads 1, the second (1 + 3) / 2, the third (1 + 3 + 5 + 7) / 4
    router = PrefixSmearRouter(1, 2)
    x = torch.tensor([[[1.0], [3.0], [5.0], [7.0], [9.0]]])
    sources, segment = router.sources(x, torch.ones(1, 5, dtype=torch.bool))
    assert sources.flatten().tolist() == [1.0, 2.0, 4.0]
    assert segment.tolist() == [[0, 0, 1, 1, 2]]


def layer_of(router, num_experts=3):
    torch.manual_seed(0)
    return MoELayer(ExpertPool(MLPExpert(4, 6), num_experts), router)


def test_padding_changes_nothing():
    layer = layer_of(PrefixSmearRouter(4, 2))
    x, mask = torch.randn(1, 7, 4), torch.tensor([[False, True, True, False, True, True, True]])
    assert_close(layer(x, mask)[mask], layer(x[mask].unsqueeze(0))[0])


def test_one_expert_is_that_expert():
    layer = layer_of(PrefixSmearRouter(4, 2), num_experts=1)
    x = torch.randn(2, 5, 4)
    assert_close(layer(x), layer.expert_output(0, x))


def test_gradients_in_float64():
    layer = layer_of(PrefixSmearRouter(4, 2)).double()
    # the first token decides over the first segment behind a stop-gradient, so finite differences see more there
    first, later = torch.randn(1, 5, 4, dtype=torch.float64).split([1, 4], 1)
    assert torch.autograd.gradcheck(lambda z: layer(torch.cat([first, z], 1)), later.requires_grad_())


@pytest.mark.parametrize("router", [PrefixSmearRouter(4, 2), LoryRouter(4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_with_a_cache_equal_the_whole(router, padded):
    layer = layer_of(router).eval()
    x = torch.randn(2, 7, 4)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = not padded
    cache, parts = BlockCache(), []
    for piece in ([0, 1, 2, 3], [4], [5, 6]):
        now = mask[:, piece] if padded else None
        step = Step(now, mask[:, : piece[-1] + 1] if padded else None, None, torch.tensor(piece), None, None)
        parts.append(merge_step(layer, x[:, piece], step, cache))
    assert_close(torch.cat(parts, 1), layer(x, mask if padded else None))


def test_segments_have_a_length():
    with pytest.raises(ValueError, match="segment_length must be at least 1"):
        PrefixSmearRouter(4, 0)
