"""Generation: the cache changes nothing, nor does padding."""

import pytest
import torch

from modmoe.language import PRESETS, generate


@pytest.fixture
def prompts():
    return torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("padded", "temperature"), [(False, 0.0), (True, 0.8)])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_cached_equals_uncached(preset, padded, temperature, build, prompts, domains_of):
    model, domains = build(preset), domains_of(preset, 3)
    mask = None
    if padded:
        mask = torch.ones(3, 8, dtype=torch.bool)
        mask[1, :3] = mask[2, :7] = False
    texts = [
        generate(model, prompts, 11, mask, temperature, torch.Generator().manual_seed(1), domains, cached=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape == (3, 19)
    assert torch.equal(texts[0][:, :8], prompts)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_padded_batch_continues_as_each_alone(preset, build, prompts, domains_of):
    model, domains = build(preset), domains_of(preset, 3)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :3] = False
    together = generate(model, prompts, 10, mask, domains=domains)
    alone = generate(model, prompts[1:2, 3:], 10, domains=None if domains is None else domains[1:2])
    assert torch.equal(together[1:2, 3:], alone)


def test_likeliest_token_by_hand(build, prompts):
    model = build("mixtral")
    expected = prompts
    for _ in range(3):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(2)], 1)
    assert torch.equal(generate(model, prompts, 3), expected)


def test_the_mode_stays_and_seeds_decide(build, prompts):
    model = build("switch").train()
    draws = [generate(model, prompts, 12, None, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert model.training
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 17}, "past the context of 24"),
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_tokens": 1, "temperature": -1.0}, "temperature not negative"),
        ({"num_tokens": 1, "mask": torch.tensor([[True] * 7 + [False]] * 3)}, "padded on the left"),
        ({"num_tokens": 1, "mask": torch.tensor([[True, False] + [True] * 6] * 3)}, "padded on the left"),
    ],
)
def test_bad_input(options, message, build, prompts):
    with pytest.raises(ValueError, match=message):
        generate(build("dense"), prompts, **options)
