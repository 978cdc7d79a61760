"""vk.fuse on Hugging Face transformers' models: small random ones of each family, held to their own numbers."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import re
import textwrap
from pathlib import Path
from typing import Any

import fused
import pytest
import torch
from hf_models import (
    IMAGE,
    MLP,
    MODELS,
    OPS,
    TEXT,
    WHOLE,
    WIDTHS,
    built,
    close,
    dinov2,
    dinov3,
    hf,
    images,
    text,
    vit,
    words,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.fuse import rules
from vitkernels.residual import known


@pytest.mark.parametrize("name", MODELS)
def test_output_and_every_gradient(name: str) -> None:
    model, inputs, keywords, ops = built(name)
    explanation = fused.check_parity(model, inputs, keywords, ops=ops)
    assert explanation.summary == ("4 of 4 blocks fused" if name == "mae" else WHOLE)
    assert not explanation.fallbacks


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "clip, padded text", "siglip, images"])
def test_bf16_autocast_errs_no_more_than_twice_as_much(name: str) -> None:
    model, inputs, keywords, ops = built(name)
    # the gradient of a bias on k is 0: what comes out is rounding alone, beside other gradients of about 1
    fused.check_parity(model, inputs, keywords, ops=ops, autocast=True, absolute=2e-3)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["dinov2", "dinov3", "dropout"])
def test_the_same_seed_drops_the_same(name: str, autocast: bool) -> None:
    model = {
        "dinov2": lambda: dinov2(drop_path_rate=0.5, num_hidden_layers=3),
        "dinov3": lambda: dinov3(drop_path_rate=0.5, num_hidden_layers=3, pos_embed_rescale=2.0),
        "dropout": lambda: vit(hidden_dropout_prob=0.3),
    }[name]()
    fused.stir(model.train())
    runs, inputs = [], (torch.randn(6, 3, 32, 32),)
    for _ in range(2):
        torch.manual_seed(3)
        runs.append((fused.output_and_gradients(model, inputs, autocast=autocast), torch.get_rng_state()))
        vk.fuse(model)
    (own, state), (got, after) = runs
    assert torch.equal(state, after)
    close(got, own, 0.03 if autocast else 1e-5)
    assert not vk.explain(model).unfused


def test_a_dropout_of_weights_is_the_modules_own() -> None:
    model, inputs = vit(attention_probs_dropout_prob=0.2).train(), images()()
    fused.stir(model)
    torch.manual_seed(1)
    own = fused.output_and_gradients(model, inputs)
    vk.fuse(model)
    torch.manual_seed(1)
    got = fused.output_and_gradients(model, inputs)
    close(got, own, 1e-4)
    explanation, reason = vk.explain(model), "a dropout of attention's weights"
    assert explanation.summary == f"0 of 2 blocks fused; block 0: {reason}; block 1: {reason}"
    assert vk.explain(model.eval()).summary == WHOLE


# ---------------------------------------------------------------------------------------------- calls that fall back


def test_attentions_and_hidden_states_are_the_stock_models() -> None:
    model, inputs = vit(attn_implementation="eager"), images()()
    asked = {"output_attentions": True, "output_hidden_states": True}
    own = model(*inputs, **asked)
    vk.fuse(model)
    with vk.record() as calls:
        got = model(*inputs, **asked)
    assert {call.op for call in calls} == OPS - {"linear", "attention_qkv"}
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(own[name]) > 0
        for ours, theirs in zip(got[name], own[name], strict=True):
            torch.testing.assert_close(ours, theirs)
    fallbacks = {f"layers.{index}.attention": {"eager attention returns its weights": 1} for index in range(2)}
    assert vk.explain(model).fallbacks == fallbacks
    with vk.record() as calls:
        model(*inputs, output_hidden_states=True)
    assert {call.op for call in calls} == OPS  # the recorders are still there, and idle
    assert vk.explain(model).fallbacks == fallbacks


def test_attentions_that_only_some_calls_ask_for() -> None:
    """The recorders stay where the first such call hung them; no keyword of the layer says whether they record."""
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    sizes = {**WIDTHS, **MLP, "image_size": [32, 32], "patch_size": [8, 8]}
    model = InternVLVisionModel(hf.InternVLVisionConfig(**sizes, attn_implementation="eager")).eval()
    inputs = images()()
    own = model(*inputs, output_attentions=True).attentions
    vk.fuse(model)
    for asks in (True, False, False, True, False, True):
        with vk.record() as calls:
            got = model(*inputs, output_attentions=asks).attentions
        assert ("attention_qkv" in {call.op for call in calls}) is not asks
        assert len(got or ()) == (len(own) if asks else 0)
        for ours, theirs in zip(got or (), own, strict=False):
            torch.testing.assert_close(ours, theirs)


def test_a_gate_that_is_made_of_a_parameter_is_made_at_each_call() -> None:
    from transformers.models.mllama.modeling_mllama import MllamaVisionEncoderLayer

    config = hf.MllamaVisionConfig(hidden_size=48, attention_heads=3, intermediate_size=96)
    layer = MllamaVisionEncoderLayer(config, is_gated=True)
    x = torch.randn(2, 9, 48)
    twin = vk.fuse(copy.deepcopy(layer))
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-2) for each in (layer, twin)]
    for _ in range(4):
        expected = fused.output_and_gradients(layer, (x,))
        got = fused.served(twin, (x,), ops=OPS - {"patch_embed"})
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
        for each, grads, optimizer in zip((layer, twin), (expected, got), optimizers, strict=True):
            for name, parameter in each.named_parameters():
                parameter.grad = grads[name]
            optimizer.step()


def test_a_users_hook_still_sees_the_attention() -> None:
    model, inputs = vit(), images()()
    own = model(*inputs).last_hidden_state
    seen = []
    vk.fuse(model)
    model.layers[1].attention.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(*inputs).last_hidden_state, own)
    ((tokens, weights),) = seen
    assert tokens.shape == (2, 17, 48)
    assert weights is None
    assert vk.explain(model).summary == "1 of 2 blocks fused; block 1: a hook on attention"


def test_a_layer_with_a_forward_of_its_own_is_left_to_it() -> None:
    model, inputs = vit(), images()()
    layer = model.layers[0]
    layer.forward = layer.forward  # as accelerate's device maps wrap it
    own = model(*inputs).last_hidden_state
    explanation = vk.explain(vk.fuse(model))
    torch.testing.assert_close(model(*inputs).last_hidden_state, own)
    assert explanation.unfused == {"layers.0": "a forward of its own, which another class would not change"}
    assert {"layers.0.attention", "layers.0.mlp"} <= {row.module for row in explanation.rows if row.ops}


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"attention_mask": torch.zeros(17, 17)}, "called with a mask of 2 axes"),
        ({"position_ids": torch.arange(17)}, "called with position_ids"),
    ],
    ids=["mask", "keyword"],
)
def test_calls_that_belong_to_the_stock_code(keywords: dict[str, Any], reason: str) -> None:
    layer, tokens = vit().layers[0], torch.randn(2, 17, 48)
    own = layer(tokens, **keywords)
    vk.fuse(layer)
    torch.testing.assert_close(layer(tokens, **keywords), own)
    assert vk.explain(layer).fallbacks == {"attention": {reason: 1}}


def test_masks_of_fewer_images_than_there_are_belong_to_the_stock_code() -> None:
    layer, tokens, masks = vk.fuse(vit().layers[0]), torch.randn(4, 17, 48), torch.randn(4, 1, 17, 17)
    with vk.record() as calls:
        layer(tokens, attention_mask=masks)
    assert "attention_qkv" in {each.op for each in calls}
    with pytest.raises(RuntimeError, match=r"must match the size|expanded size"):  # torch's own
        layer(tokens, attention_mask=masks[:2])
    assert "called with masks of 2 sequences, and tokens of 4" in vk.explain(layer).fallbacks[""]


def test_an_attention_function_that_is_not_known_runs_as_it_is() -> None:
    explanation = vk.explain(vk.fuse(vit(attn_implementation="flex_attention")))
    assert explanation.unfused["layers.0"] == "attn_implementation is 'flex_attention'"


def test_rotary_layers_need_their_positions() -> None:
    layer = vk.fuse(dinov3().model.layer[0])
    with pytest.raises(TypeError):  # the stock layer's own
        layer(torch.randn(2, 19, 48))


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_modules_outside_of_a_fused_layer(name: str) -> None:
    model = vit()
    fused.stir(model)
    ops = {"attention": {"linear", "attention_qkv"}, "mlp": {"mlp"}}[name]
    fused.check_parity(model, images()(), ops=ops, prepare=lambda model: vk.fuse(model, only=f"layers.*.{name}"))


def test_feed_forward_is_known_by_its_structure() -> None:
    model = text("PhiModel", "PhiConfig", resid_pdrop=0.0)
    fused.stir(model)
    explanation = fused.check_parity(model, words(), ops={"mlp"})
    assert {row.module for row in explanation.rows if row.ops == "mlp"} == {f"layers.{index}.mlp" for index in range(2)}


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_both_towers(kind: str) -> None:
    sizes = {"text_config": TEXT, "vision_config": {**WIDTHS, **MLP, **IMAGE}}
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes))
    fused.stir(model)
    keywords = {"input_ids": words()[0], "pixel_values": images()()[0]}
    own = model(**keywords).logits_per_image
    vk.fuse(model, strict=True)
    torch.testing.assert_close(model(**keywords).logits_per_image, own)
    explanation = vk.explain(model)
    assert explanation.summary == "4 of 4 blocks fused"
    assert not {row.module for row in explanation.rows if row.module.endswith("norm")}, "norms behind layers are stock"


def test_a_pooling_head_is_no_block() -> None:
    assert vk.explain(vk.fuse(vit("SiglipVisionModel", "SiglipVisionConfig"))).summary == WHOLE


# --------------------------------------------------------------------------------------------- what people do with them


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "dinov3", "clip, images"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, inputs, keywords, _ = built(name)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        output = model(*inputs, **keywords)[0]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    own = gradients()
    vk.fuse(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    with vk.record() as calls:
        got = gradients()
    assert [call.op for call in calls if call.direction == "forward"].count("mlp") == 4  # again for the backward pass
    close(got, own, 1e-5)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_layers(reentrant: bool, size: int) -> None:
    model = vit(num_hidden_layers=4)
    fused.stir(model)
    tokens = torch.randn(2, 17, 48, requires_grad=True)
    parts = [torch.nn.Sequential(*model.layers[start : start + size]) for start in range(0, 4, size)]

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model.zero_grad()
        x = tokens
        for part in parts:
            x = checkpoint(part, x, use_reentrant=reentrant) if checkpointed else part(x)
        x = model.layernorm(x)
        (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    own = gradients(False)
    vk.fuse(model)
    close(gradients(True), own, 1e-5)


@pytest.mark.parametrize("name", ["vit", "clip, text"])
def test_compiled_whole(name: str) -> None:
    model, inputs, keywords, ops = built(name)
    vk.fuse(model)
    own = fused.output_and_gradients(model, inputs, keywords)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with vk.record() as calls:
        got = fused.output_and_gradients(compiled, inputs, keywords)
    assert {call.op for call in calls} == ops
    for key, tensor in own.items():
        torch.testing.assert_close(got[key if key in got else f"_orig_mod.{key}"], tensor)


def test_copies_pickles_and_saves(tmp_path: Path) -> None:
    model, inputs, _, ops = built("dinov2")
    own = model(*inputs).last_hidden_state
    vk.fuse(model)
    model.save_pretrained(tmp_path)
    stock = hf.Dinov2Model.from_pretrained(tmp_path)
    assert not any("_vitkernels" in vars(each) for each in stock.modules())
    torch.testing.assert_close(stock.train()(*inputs).last_hidden_state, own)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), vk.fuse(stock)):
        assert vk.explain(other).summary == WHOLE
        with vk.record() as calls:
            torch.testing.assert_close(other(*inputs).last_hidden_state, own)
        assert {call.op for call in calls} == ops
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("first", ["fuse", "adapters"])
def test_lora(first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = vit("ViTForImageClassification", num_hidden_layers=3)
    if first == "fuse":
        vk.fuse(model)
    targets = r".*layers\.1\.attention\.(q|v)_proj"
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
    fused.stir(model)
    vk.unfuse(model)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)  # else nothing asks for the patches' gradient
    explanation = fused.check_parity(model, (pixels,), ops=OPS)
    assert explanation.summary == "2 of 3 blocks fused; block 1: LoRA on q_proj"


def test_layers_run_one_by_one() -> None:
    """The loop over the layers is the model's: what it hands on, and records, is each layer's own result."""
    model, x = vit(), images()()
    expected = model(*x, output_hidden_states=True).hidden_states
    vk.fuse(model)
    with vk.record() as calls:
        got = model(*x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert [call.op for call in calls].count("add_layer_norm") == 2 * 2, "for each layer a norm, and an add with one"


def _copies() -> dict[str, list[str]]:
    """Classes of the library that are taken for copies of one text, by who takes them so."""
    found = {f"{rule.mixin.__name__} {index}": list(rule.owners) for index, rule in enumerate(rules.all_rules())}
    nested = importlib.import_module("vitkernels.fuse.rules.transformers_nested")
    found |= {f"inside {index}": list(names) for index, names in enumerate(nested.INSIDE)}
    tables = {"DropPath": known.DROP_PATHS, "LayerScale": known.LAYER_SCALES}
    found |= {kind: list(table) for kind, table in tables.items()}
    return {key: sorted(name for name in names if name.startswith("transformers.")) for key, names in found.items()}


def test_each_rule_lists_copies_of_one_text() -> None:
    for key, names in _copies().items():
        texts = {_text(name) for name in names}
        assert len(texts) <= 1, f"{key}: {names}"


def test_norms_listed_as_rms_are_of_three_texts() -> None:
    names = [name for name in known.RMS_NORMS if name.startswith("transformers.")]
    assert len({_text(name) for name in names}) == 3, "T5's, Gemma 4's, and everybody else's"


def _text(name: str) -> str:
    """The body of the class's `forward`, without annotations and docstring, and the rotations that it calls."""
    module, _, cls = name.rpartition(".")
    forward = inspect.unwrap(getattr(importlib.import_module(module), cls).forward)
    return "\n".join([_body(forward), *_rotations(forward)])


def _rotations(function: Any) -> list[str]:
    names = [name for name in function.__code__.co_names if re.match("(vision_)?apply_|rotate_", name)]
    found = [inspect.unwrap(function.__globals__[name]) for name in names if name in function.__globals__]
    return [text for each in found for text in (_body(each), *_rotations(each))]


def _body(function: Any) -> str:
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(made, ast.FunctionDef)
    body = [each for each in made.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    return "\n".join(
        ast.unparse(ast.Assign([each.target], each.value, lineno=0) if isinstance(each, ast.AnnAssign) else each)  # type: ignore[arg-type]
        for each in body
    )
