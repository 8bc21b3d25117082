"""Genre after genre without being told which: what was learned stays."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe.language import (
    GenreLearner,
    ModelSize,
    fit,
    language_model,
    log_probabilities,
    mean_loss,
    mix_by_evidence,
    relative_rise,
    zen_genres,
)

STEPS = 40


def test_mixture_by_hand():
    # two experts give the first token .5 and .1, the second .8 and .2
    # first: (.5 + .1) / 2 = .3; then the posterior is 5 to 1: (5 * .8 + .2) / 6 = .7
    log_probs = torch.tensor([[0.5, 0.8], [0.1, 0.2]]).log()
    assert_close(mix_by_evidence(log_probs), torch.tensor([0.3, 0.7]).log())


def test_mixture_costs_a_document_at_most_the_prior():
    torch.manual_seed(0)
    log_probs = -5 * torch.rand(5, 400)
    mixed = mix_by_evidence(log_probs).sum()
    assert log_probs.sum(1).max() - math.log(5) <= mixed <= log_probs.sum(1).max() + 1e-3


def test_rise_by_hand():
    assert relative_rise(math.log(4.0), math.log(5.0)) == pytest.approx(0.25)


def losses_of(predict, documents):
    return {name: mean_loss(predict(texts)) for name, texts in documents.items()}


@pytest.fixture(scope="module")
def course():
    """A pool and a dense model after each of five genres: (learner, losses after learning, losses at the end)."""
    genres = zen_genres()
    # what is forgotten is what was learned; one document each, since telling genres apart costs each document a little
    documents = {name: [genre.text] for name, genre in genres.items()}
    size = ModelSize(context=32, features=16, num_blocks=2, num_heads=2, hidden_features=32)
    torch.manual_seed(0)
    learner = GenreLearner(language_model("demix", size, 1))
    naive = language_model("dense", size)
    frozen, first = None, {"pool": {}, "oracle": {}, "naive": {}}
    for name, genre in genres.items():
        learner.learn(name, genre.text, STEPS, batch_size=4, learning_rate=0.02)
        fit(naive, genre.text, STEPS, batch_size=4, learning_rate=0.02)
        frozen = frozen or [layer.pool.expert_state(0) for layer in learner.model.layers]
        first["pool"][name] = mean_loss(learner.log_probabilities(documents[name]))
        first["oracle"][name] = mean_loss(learner.log_probabilities(documents[name], name))
        first["naive"][name] = mean_loss(log_probabilities(naive, documents[name]))
    last = {
        "pool": losses_of(learner.log_probabilities, documents),
        "oracle": {name: mean_loss(learner.log_probabilities(texts, name)) for name, texts in documents.items()},
        "naive": losses_of(lambda texts: log_probabilities(naive, texts), documents),
    }
    return learner, frozen, first, last


def test_nothing_learned_is_lost(course, capsys):
    _, _, first, last = course
    rises = {
        method: [relative_rise(first[method][name], last[method][name]) for name in list(first[method])[:-1]]
        for method in first
    }
    with capsys.disabled():
        print(f"\nlargest rise of an earlier genre's perplexity: { ({m: round(max(r), 4) for m, r in rises.items()}) }")
    assert rises["oracle"] == [0.0] * 4
    assert max(rises["pool"]) <= 0.01
    assert max(rises["naive"]) > 0.2


def test_each_genre_was_learned(course):
    _, _, _, last = course
    assert max(last["oracle"].values()) < 4.2  # log 256 = 5.5 nats without learning
    assert all(last["pool"][name] <= last["oracle"][name] + 0.05 for name in last["pool"])


def test_the_book_and_frozen_rows(course):
    learner, frozen, _, _ = course
    assert list(learner.experts.values()) == [0, 1, 2, 3, 4]
    for layer, state in zip(learner.model.layers, frozen, strict=True):
        assert layer.pool.frozen_ids == (0, 1, 2, 3, 4)
        now = layer.pool.expert_state(0)
        assert all(torch.equal(now[name], state[name]) for name in state)
    assert not any(parameter.requires_grad for parameter in learner.model.parameters())


def test_a_new_expert_starts_as_a_copy(build):
    learner = GenreLearner(build("demix", num_experts=1))
    text = torch.randint(19, (100,), generator=torch.Generator().manual_seed(0))
    learner.learn("first", text, 2, batch_size=2)
    assert learner._grow(text) == 1
    for layer in learner.model.layers:
        old, new = layer.pool.expert_state(0), layer.pool.expert_state(1)
        assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("expert."))


def test_bad_input(build):
    with pytest.raises(ValueError, match="needs a DomainRouter"):
        GenreLearner(build("mixtral"))
    with pytest.raises(ValueError, match="start with one expert"):
        GenreLearner(build("demix", num_experts=2))
    learner = GenreLearner(build("demix", num_experts=1))
    text = torch.zeros(60, dtype=torch.int64)
    with pytest.raises(ValueError, match="has not been learned"):
        learner.log_probabilities([text])
    with pytest.raises(ValueError, match="no longer than the context of 24"):
        learner.learn("short", text[:24], 1)
    learner.learn("zeros", text, 1, batch_size=1)
    with pytest.raises(ValueError, match="'zeros' has been learned"):
        learner.learn("zeros", text, 1)
    assert learner.model.layers[0].pool.num_experts == 1
