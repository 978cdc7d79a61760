"""An encoder and a decoder that read: a row of digit scans becomes text, letter by letter, "three one four".

The encoder is `vk.nn.VisionTransformer`; the decoder is torch.nn's, fused: causal attention to the letters so far, then
attention to the image's tokens. How many letters there will be only the decoder finds out. The scans that it is tested
on it has never seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shared import Scans, digits, ops_of, started, steps
from torch import Tensor, nn

import vitkernels as vk

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BEGIN, END = "<", ">"  # END fills up what is behind it
LETTERS = sorted({*"".join(NAMES), " ", BEGIN, END})
SCANS = 3
LONGEST = len(BEGIN) + SCANS * (len("three") + 1)
WIDTH, HEADS = 96, 4


class Reader(nn.Module):
    """Rows of scans, and the letters so far, to the logits of the letter behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = vk.nn.VisionTransformer(
            img_size=(8, 8 * SCANS),
            patch_size=(4, 4),
            in_chans=1,
            num_classes=0,
            global_pool="",
            class_token=False,
            embed_dim=WIDTH,
            depth=2,
            num_heads=HEADS,
            mean=(0.3,),
            std=(0.4,),
        )
        started(self.encoder)
        self.letters = nn.Embedding(len(LETTERS), WIDTH)
        self.positions = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.5)
        layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """[B, 1, 8, 8 * SCANS] uint8 and [B, L] int64 to [B, L, letters]."""
        return self.decode(self.encoder(images), text)

    def decode(self, memory: Tensor, text: Tensor) -> Tensor:
        """The same from the encoder's tokens."""
        tokens = self.letters(text) + self.positions[: text.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        return self.head(self.decoder(tokens, memory, tgt_mask=mask, tgt_is_causal=True))

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """Greedy decoding: the likeliest letter, then the likeliest behind it, until each row has its END."""
        memory = self.encoder(images)
        text = torch.full((len(images), 1), LETTERS.index(BEGIN))
        while text.shape[1] < LONGEST and not (text == LETTERS.index(END)).any(1).all():
            text = torch.cat([text, self.decode(memory, text)[:, -1:].argmax(-1)], dim=1)
        rows = ("".join(LETTERS[index] for index in row) for row in text.tolist())
        return [row.removeprefix(BEGIN).partition(END)[0] for row in rows]


def rows_of(scans: Scans, count: int) -> tuple[Tensor, list[str]]:
    """So many random rows of scans, [B, 1, 8, 8 * SCANS], and what they read."""
    picked = torch.randint(len(scans.labels), (count, SCANS))
    images = scans.images[picked].permute(0, 2, 3, 1, 4).flatten(3)
    return images, [" ".join(NAMES[label] for label in row) for row in scans.labels[picked].tolist()]


def encode(texts: list[str]) -> Tensor:
    """[B, LONGEST + 1] int64: BEGIN, the letters, and END to the end."""
    rows = (f"{BEGIN}{text}".ljust(LONGEST + 1, END) for text in texts)
    return torch.tensor([[LETTERS.index(letter) for letter in row] for row in rows])


def main(steps: int = 400) -> None:
    """Train, then read rows of scans that were held out."""
    torch.manual_seed(0)
    train, test = digits()
    model = vk.fuse(Reader())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        images, texts = rows_of(train, 32)
        text = encode(texts)
        with vk.record() as calls:
            logits = model(images, text[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            ran = {call.op for call in calls}
            assert {"patch_embed", "attention_qkv", "attention", "add_layer_norm", "mlp"} <= ran, "it did not run fused"
            print(f"runs: {ops_of(calls)}")
        if step % 50 == 0:
            print(f"step {step:4d}: loss {loss.item():.3f}")

    model.eval()
    images, texts = rows_of(test, 200)
    read = model.read(images)
    for got, expected in list(zip(read, texts, strict=True))[:5]:
        print(f"  {expected:20s} was read as {got}")
    right = sum(got == expected for got, expected in zip(read, texts, strict=True)) / len(texts)
    print(f"whole rows read without a mistake: {right:.1%}; by guessing it would be {0.1**SCANS:.1%}")
    assert right > 0.6, "it did not learn to read"


if __name__ == "__main__":
    main(steps(__doc__, default=400))
