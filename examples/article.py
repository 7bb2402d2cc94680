"""The example of the article "Building a Large Language Model from Scratch", on tinyllm's kernels.

A vocabulary of six words, two sentences, 100 epochs; then the model completes "hello world how".
Only the import is new: the vocabulary, the sizes and the training loop are the article's.

    python examples/article.py
"""

from __future__ import annotations

import torch
from torch import nn, optim

from tinyllm import SimpleLLM
from tinyllm.reference import tokenize

VOCAB = {"hello": 0, "world": 1, "how": 2, "are": 3, "you": 4, "<UNK>": 5}
SENTENCES = ["hello world how are you", "how are you hello world"]
EPOCHS = 100


def train(model: SimpleLLM) -> None:
    """Teach the model each next word of each sentence, one word at a time."""
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    tokenized = [tokenize(sentence, VOCAB) for sentence in SENTENCES]
    for epoch in range(EPOCHS):
        for sentence in tokenized:
            for i in range(1, len(sentence)):
                input_seq = torch.tensor(sentence[:i]).unsqueeze(0)  # (1, i): the words so far
                target = torch.tensor(sentence[i]).unsqueeze(0)  # (1,): the next one
                optimizer.zero_grad()
                output = model(input_seq)  # (1, i, V)
                loss = criterion(output[:, -1, :], target)
                loss.backward()
                optimizer.step()
        if epoch % 10 == 0:
            print(f"Epoch {epoch}, Loss: {loss.item()}")


def predict(model: SimpleLLM, text: str) -> str:
    """Return the word that the model finds likeliest after `text`."""
    tokens = torch.tensor(tokenize(text, VOCAB)).unsqueeze(0)
    with torch.no_grad():
        output = model(tokens)
    words = {index: word for word, index in VOCAB.items()}
    return words[int(output[0, -1].argmax())]


def main() -> None:
    torch.manual_seed(0)
    model = SimpleLLM(len(VOCAB), embedding_dim=16, hidden_dim=32, num_layers=2)
    train(model)
    text = "hello world how"
    print(f"Input: {text}, Predicted: {predict(model, text)}")


if __name__ == "__main__":
    main()
