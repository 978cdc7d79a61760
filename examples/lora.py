"""Fine-tuning with LoRA (peft) on top of `vk.fuse`: a timm model that lies in a local file learns five more digits.

The model is trained on 0 to 4 and saved. Loaded again, it is fused, gets adapters of a few numbers, and learns all ten;
its own weights stay as they are. While adapters are there, the Linears that have one are called as they are, and
`vk.explain` says so; merged, the model is fused whole again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared import Scans, accuracy, digits, ops_of, started, steps
from torch import Tensor, nn

import vitkernels as vk
from vitkernels.models import import_torchvision

import_torchvision()  # timm and peft import it; this takes one whose compiled part is of another torch, too
import peft  # noqa: E402
import timm  # noqa: E402

OPTIONS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "pos_embed": "learn",
}


def pixels(scans: Tensor) -> Tensor:
    """[B, 1, 8, 8] uint8 to what timm's models take."""
    return (scans / 255 - 0.3) / 0.4


def train(model: nn.Module, scans: Scans, steps: int, rate: float) -> None:
    """Train what asks for a gradient."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for images, labels in scans.batches(64, steps):
        loss = F.cross_entropy(model(pixels(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(steps: int = 250) -> None:
    """Save a model of five digits; load, fuse, adapt, merge."""
    torch.manual_seed(0)
    scans, test = digits()
    few = Scans(*(each[scans.labels < 5] for each in scans))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "five.pth"
        model = started(timm.create_model("vit_tiny_patch16_224", num_classes=5, **OPTIONS))
        train(model, few, steps, 3e-3)
        torch.save(model.state_dict(), path)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, checkpoint_path=str(path), **OPTIONS)
    model.reset_classifier(10)
    own = {name: each.clone() for name, each in model.state_dict().items()}

    vk.fuse(model)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    adapted = peft.get_peft_model(model, config)
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    print(f"{trained:,} of {sum(each.numel() for each in own.values()):,} numbers are trained")
    print(str(vk.explain(model)).splitlines()[-1])
    with vk.record() as calls:
        train(adapted, scans, steps, 1e-2)
    assert {"linear", "attention_qkv", "add_layer_norm"} <= {call.op for call in calls}, "it did not run fused"
    print(f"ran: {ops_of(calls)}")

    adapted.eval()
    with torch.no_grad():
        logits = adapted(pixels(test.images))
        print(f"all ten digits: {accuracy(logits, test.labels):.1%} right on held-out scans")
        base = adapted.get_base_model().state_dict()
        for name, weight in own.items():
            found = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
            assert name.startswith("head") or name.endswith(".bias") or torch.equal(found, weight), name
        merged = adapted.merge_and_unload()
        print(str(vk.explain(merged)).splitlines()[-1])
        torch.testing.assert_close(merged(pixels(test.images)), logits, atol=1e-4, rtol=1e-4)
    assert accuracy(logits, test.labels) > 0.85, "it did not learn"


if __name__ == "__main__":
    main(steps(__doc__, default=250))
