"""Attention by name, for the models of transformers that no rule knows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import fused
import pytest
import torch
from hf_models import PADDING, TEXT, hf, words
from torch import nn

import vitkernels as vk
from vitkernels.fuse.huggingface import attention


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**TEXT, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0))  # type: ignore[arg-type]


def llama() -> nn.Module:
    sizes = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.LlamaModel(hf.LlamaConfig(**sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("build", [bert, llama], ids=["bert", "llama, causal and grouped"])
def test_attention_by_name(build: Callable[[], nn.Module], masked: bool) -> None:
    vk.register_attention()
    torch.manual_seed(0)
    model, inputs, keywords = build(), words(), {"attention_mask": PADDING} if masked else {}
    fused.stir(model)

    def choose(model: nn.Module) -> nn.Module:
        model.set_attn_implementation("vitkernels")  # type: ignore[operator]
        return model

    exact = fused.output_and_gradients(copy.deepcopy(model).double(), inputs, keywords)
    own = fused.output_and_gradients(model, inputs, keywords)
    with vk.record() as calls:
        got = fused.output_and_gradients(choose(model), inputs, keywords)
    assert {call.op for call in calls} == {"attention"}
    fused.accuracy.check(got, own, exact, fused.FLOOR)
    if masked:
        whole = fused.output_and_gradients(model, inputs)
        assert (whole["output 0"] - got["output 0"]).abs().max() > 1e-3


def test_attention_by_name_runs_sdpa_where_it_must_and_says_so() -> None:
    vk.register_attention()
    model = hf.BertModel(hf.BertConfig(**TEXT, attn_implementation="vitkernels")).train()  # type: ignore[arg-type]
    inputs = words()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="runs torch's: a dropout of attention's weights"):
        got = model(*inputs).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.manual_seed(0)
    torch.testing.assert_close(got, model(*inputs).last_hidden_state)


@pytest.mark.parametrize("training", [False, True])
def test_attention_by_name_compiled(training: bool) -> None:
    vk.register_attention()
    options = {**TEXT, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attn_implementation": "vitkernels"}
    model = hf.BertModel(hf.BertConfig(**options)).train(training)  # type: ignore[arg-type]
    inputs = words()
    with vk.record() as calls:
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs, attention_mask=PADDING)
    assert {call.op for call in calls} == (set() if training else {"attention"})  # dropout is torch's
    if not training:
        torch.testing.assert_close(got[0], model(*inputs, attention_mask=PADDING)[0])


def test_attention_by_name_refuses_what_would_be_dropped() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="'s_aux', which it does not know"):
        attention(nn.Module(), q, q, q, None, s_aux=torch.zeros(2))
