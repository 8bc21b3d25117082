"""Training: the auxiliary losses are part of it, seeds decide it, and a text is learned."""

import math

import pytest
import torch
from torch.testing import assert_close

import modmoe
from modmoe.language import (
    Balance,
    ByteTokenizer,
    ModelSize,
    fit,
    generate,
    language_model,
    log_probabilities,
    mean_loss,
    perplexity,
    perplexity_by_genre,
    zen_of_python,
)
from modmoe.losses import load_balancing_loss, z_loss

TEXT = torch.randint(19, (200,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset", ["switch", "gshard", "glam", "mixtral", "moa"])
def test_auxiliary_losses_reach_the_loss(preset, build):
    model = build(preset).train()
    x = TEXT[:40].view(2, 20)
    torch.manual_seed(1)
    with_losses = model.loss(x)
    expected = torch.zeros(())
    for layer in model.layers:
        routing = layer.routing
        choices = routing.requested_choices[:, :1] if preset == "gshard" else routing.requested_choices
        expected = expected + model.balance.load * load_balancing_loss(routing.probs, choices)
        expected = expected + model.balance.z * z_loss(routing.logits)
    assert expected >= 0.01 * len(model.layers) * 0.9  # a layer's loss is about 1, times 0.01
    model.balance = Balance()
    torch.manual_seed(1)
    assert_close(with_losses - model.loss(x), expected, atol=1e-5, rtol=0)


def test_gates_learn_from_the_auxiliary_loss_alone(build):
    model = build("mixtral").train()
    model.loss(TEXT[:40].view(2, 20))
    model.auxiliary_loss().backward()
    (bank, _, _), *_ = model.layers[0].pool.growable("gate", "weight").banks()
    assert bank.grad.abs().max() > 0
    modmoe.freeze(model)
    model.loss(TEXT[:40].view(2, 20))
    assert model.auxiliary_loss() == 0


def test_log_probabilities_by_hand(build):
    model = build("mixtral")  # context 24: a document of 30 tokens is read in pieces of 24 and 5
    document = TEXT[:30]
    expected = []
    for first, last in ((0, 24), (24, 29)):
        scores = model(document[None, first:last])[0].detach().log_softmax(1)
        expected += [float(scores[i, document[first + i + 1]]) for i in range(last - first)]
    (found,) = log_probabilities(model, [document])
    assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    assert perplexity(model, [document]) == pytest.approx(math.exp(-sum(expected) / 29), rel=1e-5)


def test_an_untrained_model_that_says_nothing_has_the_vocabulary_as_perplexity(build):
    model = build("dense")
    torch.nn.init.zeros_(model.head.weight)
    assert perplexity(model, [TEXT]) == pytest.approx(19)


def test_perplexity_by_genre(build):
    model = build("demix")
    documents = {"first": [TEXT[:30]], "second": [TEXT[30:60], TEXT[60:80]]}
    found = perplexity_by_genre(model, documents, {"first": 0, "second": 2})
    assert found["second"] == pytest.approx(perplexity(model, documents["second"], 2))
    with pytest.raises(ValueError, match=r"no domain is known of \['second'\]"):
        perplexity_by_genre(model, documents, {"first": 0})


@pytest.mark.parametrize("preset", ["switch", "deepseek"])
def test_equal_seeds_equal_models(preset, build):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = build(preset)
        fit(model, TEXT, 3, batch_size=2, seed=5)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())


def test_an_optimizer_is_continued_after_growth(build):
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fit(model, TEXT, 2, batch_size=2, optimizer=optimizer)
    modmoe.freeze(model, [0])
    modmoe.grow(model)
    fit(model, TEXT, 2, batch_size=2, optimizer=optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2, 4}
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_short_text_is_learned_by_heart():
    tokenizer = ByteTokenizer()
    line = zen_of_python().splitlines()[2]
    assert line == "Beautiful is better than ugly."
    text = tokenizer.encode("\n".join([line] * 4))
    torch.manual_seed(0)
    size = ModelSize(context=32, features=16, num_blocks=2, num_heads=2, hidden_features=16)
    model = language_model("mixtral", size, 4)
    losses = fit(model, text, 60, batch_size=4, learning_rate=0.02)
    assert losses[0] > 5 > 0.5 > losses[-1]  # log 256 = 5.5 nats at the start
    prompt = tokenizer.encode("Beautiful is")
    assert tokenizer.decode(generate(model, prompt.unsqueeze(0), 18)[0]) == line


@pytest.mark.parametrize(
    ("steps", "length", "message"), [(0, 100, "got 0 steps"), (1, 24, "a text of 24 tokens has no piece of 25")]
)
def test_what_cannot_be_trained(steps, length, message, build):
    with pytest.raises(ValueError, match=message):
        fit(build("dense"), TEXT[:length], steps)


def test_documents_without_anything_to_predict(build):
    for documents in ([], [TEXT[:1]]):
        with pytest.raises(ValueError, match="at least two tokens"):
            log_probabilities(build("dense"), documents)


def test_mean_loss_weighs_tokens_not_documents():
    assert mean_loss([torch.tensor([-1.0]), torch.tensor([-2.0, -6.0])]) == pytest.approx(3.0)
