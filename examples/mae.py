"""Masked autoencoding (He et al. 2021): a ViT learns without labels to draw what is hidden, then is asked for digits.

The encoder reads half of the patches, and only these are projected; a small decoder gets the mask token on all other
places and draws them. Then a linear probe on the frozen features names scans of which half is hidden, beside the same
probe on an encoder that has learned nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shared import Scans, digits, ops_of, started, steps
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import vitkernels as vk

PATCH, WIDTH, HEADS, LABELLED = 2, 64, 4, 100


class MaskedAutoencoder(nn.Module):
    """Scans to the pixels of their hidden patches."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = vk.nn.VisionTransformer(
            img_size=8,
            patch_size=PATCH,
            in_chans=1,
            num_classes=0,
            embed_dim=WIDTH,
            depth=3,
            num_heads=HEADS,
            mean=(0.3,),
            std=(0.4,),
        )
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.places = nn.Parameter(torch.randn(1, 1 + self.encoder.patch_embed.num_patches, WIDTH) * 2)
        self.decoder = nn.Sequential(vk.nn.Block(WIDTH, HEADS, qkv_bias=True), nn.LayerNorm(WIDTH))
        self.draw = nn.Linear(WIDTH, PATCH * PATCH)
        started(self.encoder)
        started(self.decoder)

    def forward(self, images: Tensor, ratio: float = 0.5) -> Tensor:
        """[B, 1, 8, 8] uint8 to the mean squared error on hidden patches."""
        patches = F.unfold(images / 255, PATCH, stride=PATCH).transpose(1, 2)  # [B, N, P * P]
        masking = vk.nn.random_masking(*patches.shape[:2], ratio)
        seen = self.encoder.forward_features(images, keep=masking.keep)  # [B, 1 + M, D]
        whole = vk.nn.unshuffle(seen, self.mask_token, masking.restore, prefixes=1)  # [B, 1 + N, D]
        drawn = self.draw(self.decoder(whole + self.places))[:, 1:]
        return (drawn - patches).square()[masking.hidden].mean()


@torch.no_grad()
def probe(encoder: vk.nn.VisionTransformer, train: Scans, test: Scans) -> float:
    """Share of half-hidden, held-out scans that a linear classifier on the frozen features, fed few labels, names."""
    torch.manual_seed(0)  # the same halves before and after
    features = []
    for scans in (train, test):
        keep = vk.nn.random_masking(len(scans.labels), encoder.patch_embed.num_patches, 0.5).keep
        features.append(encoder.forward_features(scans.images, keep=keep)[:, 1:].mean(1).numpy())
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(features[0][:LABELLED], train.labels[:LABELLED].numpy())
    return classifier.score(features[1], test.labels.numpy())


def main(steps: int = 450) -> None:
    """Pre-train without labels, then probe."""
    torch.manual_seed(0)
    train, test = digits()
    model = MaskedAutoencoder()
    before = probe(model.encoder, train, test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with vk.record() as calls:
        for step, (images, _) in enumerate(train.batches(64, steps)):
            loss = model(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 100 == 0:
                print(f"step {step:4d}: mean squared error {loss.item():.4f}")
    assert {"patch_embed", "attention_qkv", "add_layer_norm", "mlp"} <= {call.op for call in calls}
    print(f"ran: {ops_of(calls)}")
    after = probe(model.encoder, train, test)
    print(
        f"a linear probe on {LABELLED} labels names {after:.1%} of half-hidden scans; before pre-training, {before:.1%}"
    )
    drawn = sum(losses[-20:]) / 20
    blind = (train.images / 255 - (train.images / 255).mean(0)).square().mean().item()
    print(f"what is hidden is drawn with a mean squared error of {drawn:.4f}; by the mean scan, {blind:.4f}")
    assert drawn < 0.85 * blind, "it did not learn to draw"
    assert after > before + 0.1, "its features are not better than those of a random encoder"


if __name__ == "__main__":
    main(steps(__doc__, default=450))
