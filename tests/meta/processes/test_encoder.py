import math

import pytest
import torch

from modmoe.meta.processes.encoder import CrossAttention, PointEncoder, pool_points


def test_pooling_by_hand():
    # features 2 and 6 with weights (1, .5) and (0, .5): slot 0 has mean 2 and mass 1, slot 1 mean 4 and mass 1
    features = torch.tensor([[[2.0], [6.0]]])
    weights = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])
    codes = pool_points(features, weights)
    torch.testing.assert_close(codes, torch.tensor([[[2.0, 1 / math.sqrt(2)]], [[4.0, 1 / math.sqrt(2)]]]))


def test_a_light_slot_shrinks_and_an_empty_set_is_zero():
    # mass .05 is below .1: .05 * 2 / .1 = 1
    codes = pool_points(torch.tensor([[[2.0]]]), torch.tensor([[[0.05]]]))
    torch.testing.assert_close(codes, torch.tensor([[[1.0, 1 / math.sqrt(1.05)]]]))
    assert pool_points(torch.empty(3, 0, 2), torch.empty(3, 0, 4)).tolist() == [[[0.0, 0.0, 1.0]] * 3] * 4


def test_attention_equals_a_loop():
    torch.manual_seed(0)
    attention = CrossAttention(2, 6, num_heads=3).double()
    for null in (attention.null_key, attention.null_value):
        torch.nn.init.normal_(null)
    target, x, features = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((3, 2), (4, 2), (4, 6)))
    present = torch.tensor([[True, True, False, True], [False] * 4])
    found = attention(target, x, features, present)
    for task in range(2):
        seen = present[task].nonzero().squeeze(1).tolist()
        keys = torch.stack([attention.null_key, *(attention.place(x[task, i]) for i in seen)])
        values = torch.stack([attention.null_value, *(attention.value(features[task, i]) for i in seen)])
        for n in range(3):
            query = attention.place(target[task, n])
            read = []
            for head in range(3):
                part = slice(2 * head, 2 * head + 2)
                weights = (keys[:, part] @ query[part] / math.sqrt(2)).softmax(0)
                read.append(weights @ values[:, part])
            torch.testing.assert_close(found[task, n], attention.out(torch.cat(read)))


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    attention = CrossAttention(1, 4, num_heads=2).double()
    present = torch.tensor([[True, False, True]])
    tensors = [torch.randn(1, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((2, 1), (3, 1), (3, 4))]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, present), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, present), tensors)


def test_points_are_encoded_one_by_one():
    torch.manual_seed(0)
    encoder = PointEncoder(2, 1, 8)
    x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 1)
    torch.testing.assert_close(encoder(x, y)[1, 2], encoder(x[1:2, 2:3], y[1:2, 2:3])[0, 0])


def test_heads_have_to_divide():
    with pytest.raises(ValueError, match="3 heads do not divide 8 features"):
        CrossAttention(1, 8, num_heads=3)
