"""The Vision Transformer line by line: what a tutorial writes, and beside each step the fused op that stands for it.

    pixels -> patches -> tokens -> class token before them -> positions added -> encoder -> head -> cross-entropy

Every intermediate of the two is compared, then the loss, then every gradient; at last both are trained side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shared import accuracy, digits, ops_of, steps
from torch import Tensor, nn

import vitkernels as vk

IMAGE, PATCH, WIDTH, HEADS, DEPTH, CLASSES = 8, 2, 48, 3, 2, 10
PATCHES = (IMAGE // PATCH) ** 2
MEAN, STD = (0.3,), (0.4,)  # of the scans' pixels in [0, 1]


class Tutorial(nn.Module):
    """Plain PyTorch, one step after the other; every intermediate goes to `seen` under its name.

    Args:
        norm_first: x + f(norm(x)), as ViT has it; False is norm(x + f(x)), as the first Transformer had it.
    """

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(PATCH * PATCH, WIDTH) * 0.2)  # a row of pixels -> a token
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.class_token = nn.Parameter(torch.randn(1, WIDTH) * 0.1)
        self.positions = nn.Parameter(torch.randn(1 + PATCHES, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.seen: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 8, 8] uint8 to [B, 10]."""
        # 0..255 become 0..1, then are centred
        pixels = (images / 255 - MEAN[0]) / STD[0]

        # the DNN way: cut the image into patches, lay each one out as a row of pixels, and multiply
        rows = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # [B, N, C * P * P]
        tokens = self.seen["tokens by unfold"] = rows @ self.weight + self.bias  # [B, N, D]

        # the CNN way: a kernel of P x P that steps by P sees each patch once
        maps = F.conv2d(pixels, kernel_of(self.weight), self.bias, stride=PATCH)  # [B, D, H / P, W / P]
        self.seen["tokens by convolution"] = maps.flatten(2).transpose(1, 2)

        # one more token, which no patch stands behind, collects what the image is
        tokens = torch.cat([self.class_token.expand(len(tokens), 1, -1), tokens], dim=1)  # [B, 1 + N, D]

        # attention does not know where a token stands: its position is added to it
        tokens = self.seen["class token and positions"] = tokens + self.positions

        # the encoder: self-attention and feed-forward, each with its residual add and its LayerNorm
        for index, layer in enumerate(self.encoder.layers):
            tokens = self.seen[f"encoder layer {index}"] = layer(tokens)
        tokens = self.seen["last norm"] = self.encoder.norm(tokens)

        # what is classified is the class token
        logits = self.seen["logits"] = self.head(tokens[:, 0])
        return logits


class Fused(Tutorial):
    """The same parameters; one op makes the tokens, and `vk.fuse` has swapped the encoder's layers."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 8, 8] uint8 to [B, 10]."""
        kernel = kernel_of(self.weight)
        tokens = vk.ops.patch_embed(images, kernel, self.bias, mean=MEAN, std=STD)
        self.seen["tokens by unfold"] = self.seen["tokens by convolution"] = tokens

        # the whole front in one pass: bytes, patches, projection, class token, positions
        tokens = self.seen["class token and positions"] = vk.ops.patch_embed(
            images, kernel, self.bias, mean=MEAN, std=STD, prefix=self.class_token, pos_embed=self.positions
        )
        for index, layer in enumerate(self.encoder.layers):
            tokens = self.seen[f"encoder layer {index}"] = layer(tokens)
        tokens = self.seen["last norm"] = self.encoder.norm(tokens)
        logits = self.seen["logits"] = self.head(tokens[:, 0])
        return logits


def kernel_of(weight: Tensor) -> Tensor:
    """[C * P * P, D] as Conv2d stores it, [D, C, P, P]: the same numbers."""
    return weight.t().reshape(WIDTH, 1, PATCH, PATCH)


def build(norm_first: bool) -> tuple[Tutorial, Fused]:
    """Both models, with the same weights."""
    plain, fused = Tutorial(norm_first), Fused(norm_first)
    fused.load_state_dict(plain.state_dict())
    vk.fuse(fused.encoder)
    return plain, fused


def compare(images: Tensor, labels: Tensor, norm_first: bool) -> None:
    """Print, step by step, how far apart the two are; raise where it is more than rounding."""
    plain, fused = build(norm_first)
    loss = F.cross_entropy(plain(images), labels)
    with vk.record() as calls:
        own = F.cross_entropy(fused(images), labels)
        own.backward()
    loss.backward()
    pairs = {name: (fused.seen[name], expected) for name, expected in plain.seen.items()} | {"loss": (own, loss)}
    for name, (got, expected) in pairs.items():
        print(f"  {name:26s} {list(expected.shape)!s:12s} differs by {(got - expected).abs().max():.0e} at most")
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)
    print(f"  and the gradients of all {len(list(plain.parameters()))} parameters are the same")
    ran = {call.op for call in calls}
    assert {"patch_embed", "attention_qkv", "add_layer_norm", "mlp"} <= ran, "it did not run fused"
    print(f"  ran: {ops_of(calls)}")


def main(steps: int = 200) -> None:
    """Compare, then train both on the same batches."""
    torch.manual_seed(0)
    train, test = digits()
    for norm_first, title in ((False, "post-norm, as in the first Transformer"), (True, "pre-norm, as in ViT")):
        print(title)
        compare(train.images[:8], train.labels[:8], norm_first)

    models = build(norm_first=True)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in models]
    for step, (images, labels) in enumerate(train.batches(64, steps)):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4d}: loss {losses[0]:.4f} plain, {losses[1]:.4f} fused")
    with torch.no_grad():
        right = [accuracy(model(test.images), test.labels) for model in models]
    print(f"right on held-out scans: {right[0]:.1%} plain, {right[1]:.1%} fused")
    assert min(right) > 0.85, "it did not learn"


if __name__ == "__main__":
    main(steps(__doc__, default=200))
