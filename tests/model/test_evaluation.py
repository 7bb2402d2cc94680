import math

import pytest
import torch
import torch.nn.functional as F

from tinyllm import SimpleLLM
from tinyllm.evaluation import evaluate_texts
from tinyllm.tokenizer import train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "", "x", "na\u00efve caf\u00e9 " * 30, "a b c d"]
CONTEXT = 16


def make(kind="bpe", vocab_size=300, causal=True, dropout=0.0):
    tokenizer = train_tokenizer(kind, TEXTS, vocab_size)
    torch.manual_seed(0)
    model = SimpleLLM(tokenizer.vocab_size, 16, 32, 2, num_heads=2, causal=causal, max_seq_len=CONTEXT, dropout=dropout)
    return model, tokenizer


def one_by_one(model, tokenizer, texts):
    """Return the loss of each token, given those before it in its piece."""
    losses = []
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.end_of_text_id is not None:
            ids = [tokenizer.end_of_text_id, *ids]
        for i in range(1, len(ids)):
            first = (i - 1) // CONTEXT * CONTEXT
            logits = model(torch.tensor([ids[first:i]]))[0, -1]
            losses.append(F.cross_entropy(logits.double(), torch.tensor(ids[i])).item())
    return losses


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_is_predicted_once(kind, batch_size):
    model, tokenizer = make(kind)
    found = evaluate_texts(model, tokenizer, TEXTS, batch_size)
    losses = one_by_one(model.eval(), tokenizer, TEXTS)
    assert (found.documents, found.tokens) == (len(TEXTS), len(losses))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_bits_per_byte_of_a_model_that_knows_nothing():
    model, tokenizer = make()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    found = evaluate_texts(model, tokenizer, TEXTS)
    assert tokenizer.end_of_text_id is not None  # so every byte is predicted
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(found.tokens * math.log2(tokenizer.vocab_size) / found.num_bytes)


def test_without_an_end_of_text_the_first_token_is_left_out():
    model, tokenizer = make("char")
    assert tokenizer.end_of_text_id is None
    found = evaluate_texts(model, tokenizer, ["\u00efb", "x"])
    assert (found.documents, found.tokens, found.num_bytes) == (2, 1, 1)


def test_unknown_tokens_are_counted():
    model, tokenizer = make("word")
    assert evaluate_texts(model, tokenizer, TEXTS).unknown == 0
    assert evaluate_texts(model, tokenizer, ["a zebra b"]).unknown == 1


def test_the_model_is_left_as_it_was():
    model, tokenizer = make(dropout=0.5)
    model.train()
    first, second = (evaluate_texts(model, tokenizer, TEXTS).loss for _ in range(2))
    assert first == second
    assert model.training


def test_texts_are_read_as_a_stream():
    model, tokenizer = make()
    assert evaluate_texts(model, tokenizer, (text for text in TEXTS * 50)).documents == 50 * len(TEXTS)


def test_what_cannot_be_evaluated():
    model, tokenizer = make()
    with pytest.raises(ValueError, match="there is no token to predict"):
        evaluate_texts(model, tokenizer, ["", ""])
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        evaluate_texts(model, tokenizer, TEXTS, 0)
    with pytest.raises(ValueError, match=r"the tokenizer has .* tokens, the model .*: they do not belong together"):
        evaluate_texts(model, make("char")[1], TEXTS)
    with pytest.raises(ValueError, match="the model is not causal"):
        evaluate_texts(make(causal=False)[0], tokenizer, TEXTS)
