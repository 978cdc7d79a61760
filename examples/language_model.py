"""A decoder-only Transformer that learns a text letter by letter, then writes one of its own.

torch.nn has no layer of that name: it is the encoder's, with a causal mask, and `vk.fuse` serves it. What is learned is
held against counting: the best model that sees one letter before the next one.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import ops_of, steps
from torch import Tensor, nn

import vitkernels as vk

TEXT = Path(__file__).with_name("text.txt").read_text()
LETTERS = sorted(set(TEXT))
CONTEXT, WIDTH, HEADS, DEPTH = 48, 96, 4, 3


class LanguageModel(nn.Module):
    """Letters to the logits of the letter behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.5)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        layer.dropout1.p = layer.dropout2.p = 0.1  # of what is added; within attention and feed-forward none is fused
        self.decoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, text: Tensor) -> Tensor:
        """[B, N] int64, N up to CONTEXT, to [B, N, letters]."""
        tokens = self.letters(text) + self.positions[: text.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        return self.head(self.decoder(tokens, mask=mask, is_causal=True))  # no letter sees what is behind it

    @torch.no_grad()
    def generate(self, begin: str, count: int, temperature: float = 0.4) -> str:
        """The text with so many letters behind it, each drawn from what the model expects there."""
        text = encode(begin)
        for _ in range(count):
            logits = self(text[None, -CONTEXT:])[0, -1]
            drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            text = torch.cat([text, drawn])
        return "".join(LETTERS[index] for index in text.tolist())


def encode(text: str) -> Tensor:
    """[N] int64, the letters' numbers."""
    return torch.tensor([LETTERS.index(letter) for letter in text])


def counting(train: Tensor, held_out: Tensor) -> float:
    """Cross-entropy, on held-out text, of counting which letter follows which."""
    counts = torch.full((len(LETTERS), len(LETTERS)), 0.1)
    counts.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True)
    chances = counts / counts.sum(1, keepdim=True)
    return -chances[held_out[:-1], held_out[1:]].log().mean().item()


@torch.no_grad()
def cross_entropy(model: LanguageModel, text: Tensor) -> float:
    """The model's mean surprise at the letters of a text, in nats; windows of CONTEXT letters that lie side by side."""
    windows = text[: (len(text) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()


def main(steps: int = 500) -> None:
    """Train, compare with counting on held-out text, and write."""
    torch.manual_seed(0)
    text = encode(TEXT)
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    windows = train.unfold(0, CONTEXT + 1, 1)  # every place at which a window may begin; a view

    model = vk.fuse(LanguageModel())
    with vk.record() as calls:
        model(windows[:1, :-1]).sum().backward()
    assert {"attention_qkv", "add_layer_norm", "mlp"} <= {call.op for call in calls}, "it did not run fused"
    print(f"runs: {ops_of(calls)}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}: {loss.item():.3f} nats a letter")

    model.eval()
    counted, learned = counting(train, held_out), cross_entropy(model, held_out)
    print(f"held-out text: {learned:.3f} nats a letter, {counted:.3f} by counting, {math.log(len(LETTERS)):.3f} blind")
    written = model.generate("The miller ", 300)
    print(written)
    words = written.split()[:-1]
    known = sum(word in set(TEXT.split()) for word in words) / len(words)
    print(f"{known:.0%} of the words that it wrote are in the text")
    assert learned < 0.95 * counted, "it did not learn more than pairs of letters"
    assert known > 0.4, "it did not learn words"


if __name__ == "__main__":
    main(steps(__doc__, default=500))
