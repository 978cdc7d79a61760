"""Encoder-only: digit scans classified by the class token, and by the mean of the patches; then at a larger size.

Both models are trained on scans of 16 pixels, and read scans of 20 and 24 pixels as they are: the table of positions is
interpolated, as many tokens as there are patches run through the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shared import accuracy, digits, ops_of, started, steps
from torch import Tensor, nn

import vitkernels as vk

SIZE, LARGER = 16, (20, 24)


def build(pool: str) -> vk.nn.VisionTransformer:
    """A small ViT; with "avg" it needs no class token."""
    model = vk.nn.VisionTransformer(
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        global_pool=pool,
        class_token=pool == "token",
        embed_dim=64,
        depth=3,
        num_heads=4,
        drop_path_rate=0.05,
        mean=(0.3,),
        std=(0.35,),
    )
    return started(model)


def resized(scans: Tensor, size: int) -> Tensor:
    """[B, 1, 8, 8] uint8 to [B, 1, size, size] uint8."""
    return F.interpolate(scans.float(), size=(size, size), mode="bilinear").round().to(torch.uint8)


def augmented(scans: Tensor) -> Tensor:
    """Each scan a little larger or smaller: a model that has seen one size of strokes knows no other."""
    side = int(torch.randint(SIZE - 2, SIZE + 5, ()))
    larger = resized(scans, side)
    over = max(side - SIZE, 0)
    top, left = (int(torch.randint(over + 1, ())) for _ in range(2))
    cut = larger[:, :, top : top + SIZE, left : left + SIZE]
    return F.pad(cut, (0, SIZE - cut.shape[3], 0, SIZE - cut.shape[2]))


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model names rightly."""
    return accuracy(model.eval()(images), labels)


def main(steps: int = 300) -> None:
    """Train both models, and test them at three sizes."""
    train, test = digits()
    for pool, title in (("token", "class token"), ("avg", "mean of the patches")):
        torch.manual_seed(0)
        model = build(pool)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        with vk.record() as calls:
            for images, labels in train.batches(64, steps):
                loss = F.cross_entropy(model(augmented(images)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        ran = {call.op for call in calls}
        assert {"patch_embed", "attention_qkv", "add_layer_norm", "mlp"} <= ran, "it did not run fused"
        found = {size: right(model, resized(test.images, size), test.labels) for size in (SIZE, *LARGER)}
        print(f"{title}: " + ", ".join(f"{share:.1%} at {size} pixels" for size, share in found.items()))
        assert found[SIZE] > 0.8, "it did not learn"
        assert min(found.values()) > 0.55, "it does not read larger scans"
    print(f"ran: {ops_of(calls)}")


if __name__ == "__main__":
    main(steps(__doc__, default=300))
