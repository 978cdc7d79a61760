"""A fused model in the training loops of others: Lightning, transformers' Trainer, and what timm's train.py calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vitkernels as vk

timm = peers.import_timm()
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


class Colours(Dataset[tuple[Tensor, int]]):
    """Images of one colour of three."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.full((3, 16, 16), -1.0)
        image[index % 3] = 1.0
        return image, index % 3


def _model() -> nn.Module:
    torch.manual_seed(0)
    return vk.fuse(timm.create_model("vit_tiny_patch16_224", **SIZES))


def _learnt(model: nn.Module) -> None:
    images, labels = next(iter(DataLoader(Colours(), batch_size=24)))
    with torch.no_grad():
        output = model.eval()(images)
    assert torch.equal(getattr(output, "logits", output).argmax(-1), labels)
    assert vk.explain(model).summary == "2 of 2 blocks fused"


def _served(calls: list[vk.Call]) -> None:
    ran = {(call.op, call.direction) for call in calls if call.backend != "reference"}
    assert ran >= {(op, way) for op in ("attention_qkv", "mlp", "add_layer_norm") for way in ("forward", "backward")}


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(max_epochs=12, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with vk.record() as calls:
        trainer.fit(module, DataLoader(Colours(), batch_size=8, shuffle=True))
    _served(calls)
    _learnt(module.model)


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)
    model = vk.fuse(transformers.ViTForImageClassification(config))
    rows = [{"pixel_values": image, "labels": label} for image, label in (Colours()[index] for index in range(24))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with vk.record() as calls:
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    ran = {call.op for call in calls if call.direction == "backward"}
    assert ran >= {"mlp", "add_layer_norm"}
    _learnt(model)


def test_what_timms_train_script_calls() -> None:
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    model = _model()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.9)
    schedule, epochs = create_scheduler_v2(optimizer, num_epochs=12)
    average, scaler = ModelEmaV3(model, decay=0.5), NativeScaler("cpu")
    mixup, loss_of = Mixup(mixup_alpha=0.1, num_classes=3), SoftTargetCrossEntropy()
    with vk.record() as calls:
        for epoch in range(epochs):
            for images, labels in DataLoader(Colours(), batch_size=8, shuffle=True):
                images, targets = mixup(images, labels)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model(images), targets)
                optimizer.zero_grad()
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
                average.update(model)
            schedule.step(epoch + 1)
    _served(calls)
    _learnt(model)
    _learnt(average.module)
