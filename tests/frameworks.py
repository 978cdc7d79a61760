"""What each framework makes of a model: functions of a classifier of images to the numbers that come out.

A function is called twice, with a stock model and with the same model fused, from the same random state.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.data import DataLoader, TensorDataset

Numbers = dict[str, Tensor]
STEPS = 2


def batches(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of as many batches as there are steps."""
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(4, 3, size, size, generator=generator), torch.randint(10, (4,), generator=generator))
        for _ in range(STEPS)
    ]


def loader() -> DataLoader[Any]:
    images, labels = (torch.cat(each) for each in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def weights(model: nn.Module) -> Numbers:
    return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> Numbers:
    return {name: each.grad.float() for name, each in model.named_parameters() if each.grad is not None}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1, momentum=0.9)


def steps(model: nn.Module, of: nn.Module | None = None, **autocast: Any) -> Numbers:
    """Plain training: the losses, and the weights after them.

    Args:
        model: what is called.
        of: whose weights are returned, where the model is a wrapper.
        autocast: arguments of torch.autocast.
    """
    optimizer, found = sgd(model), {}
    for index, (images, labels) in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", **autocast) if autocast else contextlib.nullcontext():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        found[f"loss {index}"] = loss.detach()
    return found | weights(of or model)


# ------------------------------------------------------------------------------------------------------------- torch


def of_two_sizes(model: nn.Module) -> Numbers:
    """Losses and gradients on images of two sizes that are not the model's own, each size twice."""
    found = {}
    for turn, size in enumerate((48, 64, 48, 64)):
        model.zero_grad()
        images, labels = batches(size)[0]
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        found |= {f"{turn}: {name}": each for name, each in {"loss": loss.detach(), **gradients(model)}.items()}
    return {name.replace("_orig_mod.", ""): each for name, each in found.items()}


def compiled(model: nn.Module, graphs: int = 2, **options: Any) -> Numbers:
    """As many graphs as that for both sizes; a size that returns compiles nothing."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    found = of_two_sizes(torch.compile(model, fullgraph=True, backend="aot_eager", **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    return found


def compiled_for_any_size(model: nn.Module) -> Numbers:
    return compiled(model, graphs=1, dynamic=True)


def in_eval(model: nn.Module) -> Numbers:
    images, _ = batches()[0]
    with torch.no_grad():
        return {f"{count} images": model.eval()(images[:count]) for count in (4, 3)}


def ahead_of_time(model: nn.Module) -> Numbers:
    """torch.export, then a library made by AOTInductor, on another number of images too."""
    images, _ = batches()[0]
    batch = torch.export.Dim("batch", min=2, max=8)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: batch},))
        with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
            path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        library = torch._inductor.aoti_load_package(path)
        return {f"{count} images": library(images[:count]) for count in (4, 3)}


def cuda_graph(model: nn.Module) -> Numbers:
    """Forward and backward, captured once and replayed on other images."""
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs: torch sees no CUDA device")
    model = model.cuda()
    (first, _), (images, labels) = batches()
    graphed = torch.cuda.make_graphed_callables(model, (first.cuda(),))
    loss = F.cross_entropy(graphed(images.cuda()), labels.cuda())
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def half_with_scaler(model: nn.Module) -> Numbers:
    """fp16 autocast under a GradScaler: gradients are unscaled, and a step that overflows is left out."""
    scaler, optimizer, found = torch.amp.GradScaler("cpu", init_scale=2.0**8), sgd(model), {}
    for index, (images, labels) in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found |= {f"loss {index}": loss.detach(), f"norm {index}": nn.utils.clip_grad_norm_(model.parameters(), 1.0)}
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = weights(model)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**119
    assert all(torch.equal(each, before[name]) for name, each in weights(model).items())
    return found | weights(model)


def selective_checkpointing(model: nn.Module) -> Numbers:
    """Products are kept, everything else is computed again."""

    def policy(context: Any, op: Any, *args: Any, **keywords: Any) -> checkpoint.CheckpointPolicy:
        keeps = any(word in str(op) for word in ("linear", "mlp", "mm", "bmm"))
        return checkpoint.CheckpointPolicy.MUST_SAVE if keeps else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    images, labels = batches()[0]
    output = checkpoint.checkpoint(
        model, images, use_reentrant=False, context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(policy)
    )
    loss = F.cross_entropy(output, labels)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def functional(model: nn.Module) -> Numbers:
    """torch.func: a gradient of each sample by vmap, with weights from outside."""
    images, labels = batches()[0]
    given = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights: Numbers, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (image[None],)), label[None])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # vmap says that it runs the ops sample by sample
        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(given, images, labels)


def ema(model: nn.Module) -> Numbers:
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        average.update_parameters(model)
    return {"output": average(images), **weights(average.module)}


def swa(model: nn.Module) -> Numbers:
    average, optimizer = torch.optim.swa_utils.AveragedModel(model), sgd(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=1)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        average.update_parameters(model)
        schedule.step()
    torch.optim.swa_utils.update_bn(loader(), average)
    return {"output": average(images), **weights(average.module)}


# --------------------------------------------------------------------------------------------------------- libraries


def lightning(model: nn.Module) -> Numbers:
    """Lightning's Trainer, in bfloat16, with accumulated and clipped gradients."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="bf16-mixed",
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=True,
            enable_checkpointing=False,
        )
        trainer.fit(module, loader())
        trainer.save_checkpoint(Path(folder) / "model.ckpt")
        saved = torch.load(Path(folder) / "model.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], each) for name, each in model.state_dict().items())
    return {f"loss {index}": each for index, each in enumerate(module.losses)} | weights(model)


def accelerated(model: nn.Module) -> Numbers:
    """accelerate's Accelerator, in bfloat16."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's, in this process before
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer, data = accelerator.prepare(model, sgd(model), loader())
    found = {}
    for index, (images, labels) in enumerate(data):
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(images), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        found[f"loss {index}"] = loss.detach()
    return found | weights(accelerator.unwrap_model(prepared))


def trainer(model: nn.Module) -> Numbers:
    """transformers' Trainer: a model that is fused before it is given."""
    import transformers

    pairs = [pair for batch in batches() for pair in zip(*batch, strict=True)]
    data = [{"pixel_values": image, "labels": label} for image, label in pairs]
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=4,
            max_steps=STEPS,
            optim="sgd",
            learning_rate=0.1,
            use_cpu=True,
            gradient_checkpointing=True,
            save_strategy="steps",
            save_steps=STEPS,
            report_to=[],
            disable_tqdm=True,
        )
        run = transformers.Trainer(model, options, train_dataset=data)
        result = run.train()
        again = type(model).from_pretrained(Path(folder) / f"checkpoint-{STEPS}")
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in again.state_dict().items())
    return {"loss": torch.tensor(result.training_loss), **weights(model)}


def timm_loop(model: nn.Module) -> Numbers:
    """The pieces of timm's training script: optimizer with layer decay, mixup, scaler, clipping, EMA, scheduler."""
    import numpy
    import timm.data
    import timm.loss
    import timm.optim
    import timm.scheduler
    import timm.utils

    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.7)
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=2)
    scaler = timm.utils.NativeScaler("cpu")
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    mixup, criterion = timm.data.Mixup(0.8, 1.0, num_classes=10), timm.loss.SoftTargetCrossEntropy()
    found = {}
    numpy.random.seed(0)  # mixup's
    for index, (images, labels) in enumerate(batches()):
        images, targets = mixup(images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(images), targets)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, clip_mode="agc", parameters=timm.models.model_parameters(model, True))
        average.update(model, step=index)
        schedule.step(index + 1)
        found[f"loss {index}"] = loss.detach()
    return found | {f"average of {name}": each for name, each in weights(average.module).items()}


def lora(model: nn.Module) -> Numbers:
    """peft: adapters of one projection, trained, saved, loaded and merged."""
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=r".*blocks\.0\.attn\.qkv", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    found = steps(adapted)
    images, _ = batches()[0]
    expected = adapted(images)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)
    return found | {"merged": merged(images)}


def quantized(model: nn.Module) -> Numbers:
    """torchao: weights of 8 bits in the Linears."""
    import torchao.quantization as ao

    model = model.eval()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with torch.no_grad():
        return {"output": model(batches()[0][0])}
