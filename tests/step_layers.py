"""One step of a residual stream on random tokens, by `ops/_steps.py` and by the public ops one by one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.ops import _step, _steps

B, N, D, F, H = 2, 5, 24, 40, 3
WINDOWS = _steps.Windows((4, 6), (2, 3), (1, 2))  # of an image, in the step "windows"
FEED_FORWARDS = ("mlp", "glu_mlp", "glu_mlp apart")
MASKED = ("attention", "windows", "rotary", "head norms")
KINDS = ("linear", *FEED_FORWARDS, *MASKED, "packed")
FACTORS = ("branch_bias", "scale", "row_scale")
Results = tuple[Tensor, Tensor]  # total and the product
OPS = {
    "linear": ["linear"],
    "mlp": ["mlp"],
    "glu_mlp": ["glu_mlp"],
    "glu_mlp apart": ["glu_mlp"],
    "attention": ["linear", "attention_qkv", "linear"],
    "windows": ["linear", "attention_qkv", "linear"],
    "rotary": ["linear", "rotary_qkv", "attention_qkv", "linear"],
    "head norms": ["linear", "rotary_qkv", "attention_qkv", "linear"],
    "packed": ["linear", "rotary_qkv", "attention_varlen", "linear"],
}


class Layer:
    """The tensors of a step by name, all of which learn but positions, and the two ways to run it.

    Args:
        kind: one of KINDS.
        dtype: of every tensor.
        bias: whether the norm and the products have one.
        branch: whether something is added to the stream first.
        factors: which of FACTORS the branch has.
        mask: whether a mask [B, H, N, N] is added to attention's scores, one for each window of an image; it learns.
        causal: whether attention is causal.
        activation: of the feed-forward.
        rms: whether the norm is an RMSNorm.
    """

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = True,
        branch: bool = True,
        factors: Collection[str] = (),
        mask: bool = False,
        causal: bool = False,
        activation: str = "gelu",
        rms: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        self.kind, self.causal, self.activation, self.rms = kind, causal, activation, rms
        self.images: _steps.Images | None = None
        tokens, attends = WINDOWS.sides if kind == "windows" else (N,), kind in (*MASKED, "packed")
        self.tensors = {"x": draw(B, *tokens, D), "weight": draw(D)}
        if branch:
            self.tensors["branch"] = draw(B, *tokens, D)
            self.tensors |= {name: draw(B if name == "row_scale" else D) for name in factors}
        hidden = 3 * D if attends else 2 * F if kind == "glu_mlp" else F
        self.tensors["w1"] = draw(hidden, D)
        if kind == "glu_mlp apart":
            self.tensors["w_up"] = draw(hidden, D)
            if bias:
                self.tensors["b_up"] = draw(hidden)
        if kind != "linear":
            self.tensors["w2"] = draw(D, D if attends else F)
        if bias:
            self.tensors |= {"bias": draw(D), "b1": draw(hidden)}
            if kind != "linear":
                self.tensors["b2"] = draw(D)
        if kind in ("head norms", "packed"):
            vectors = ("q_weight", "q_bias", "k_weight", "k_bias") if kind == "head norms" else ("q_weight", "k_weight")
            self.tensors |= {name: draw(D // H) for name in vectors}
        self._place(B, N)
        if mask:
            batches, seen = (WINDOWS.per_image, WINDOWS.tokens) if kind == "windows" else (B, N)
            self.tensors["mask"] = draw(batches, H, seen, seen)

    def _place(self, batch: int, tokens: int) -> None:
        """Positions of so many tokens, and where images of them end."""
        if self.kind not in ("rotary", "packed"):
            return
        count = tokens - 2 if self.kind == "rotary" else batch * tokens
        wide = self.tensors["x"].dtype == torch.float64
        angles = torch.linspace(0, 9, count * D // H, dtype=torch.float64).view(count, D // H)
        angles = angles if wide else angles.float()
        self.tensors |= {"sin": angles.sin(), "cos": angles.cos()}
        if self.kind == "packed":
            ends = torch.tensor([0, count // 3, count // 3, count], dtype=torch.int32)  # one has no tokens
            self.images = _steps.Images(ends, count)

    def resize(self, *shape: int) -> None:
        """Other tokens, [B, N, D] or an image, and as many positions."""
        for name in ("x", "branch"):
            self.tensors[name] = torch.randn(shape).to(self.tensors[name].dtype).requires_grad_()
        self._place(*shape[:2])

    def freeze(self, *names: str) -> None:
        for name in names:
            self.tensors[name].requires_grad_(False)

    @property
    def learn(self) -> dict[str, Tensor]:
        """The tensors that do, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    @property
    def norm(self) -> _steps.Norm:
        return _steps.Norm(self.tensors.get("weight"), self.tensors.get("bias"), 1e-5, rms=self.rms)

    @property
    def added(self) -> _steps.Added | None:
        given = self.tensors
        return _steps.Added(given["branch"], *(given.get(name) for name in FACTORS)) if "branch" in given else None

    def together(self, **given: Tensor) -> Results:
        """By the step; `given` stands for tensors of the layer."""
        mine, self.tensors = self.tensors, {**self.tensors, **given}
        try:
            return self._together()
        finally:
            self.tensors = mine

    def _together(self) -> Results:
        x, w1, b1, w2, b2 = (self.tensors.get(name) for name in ("x", "w1", "b1", "w2", "b2"))
        assert x is not None
        assert w1 is not None
        if self.kind == "linear":
            return _steps.linear(x, self.added, self.norm, w1, b1)
        assert w2 is not None
        if self.kind == "mlp":
            return _steps.mlp(x, self.added, self.norm, (w1, b1, w2, b2), self.activation)
        if self.kind in FEED_FORWARDS:
            w_up, b_up = (self.tensors.get(name) for name in ("w_up", "b_up"))
            return _steps.glu_mlp(x, self.added, self.norm, (w1, b1, w_up, b_up, w2, b2), self.activation)
        called = _steps.Called(self.tensors.get("mask"), self.causal, self.positions, self.images)
        norms = _steps.HeadNorms(**self.head_norms) if self.head_norms else None
        windows = WINDOWS if self.kind == "windows" else None
        return _steps.attention(x, self.added, self.norm, (w1, b1), (w2, b2), H, called, norms=norms, windows=windows)

    @property
    def positions(self) -> _steps.Positions:
        prefix = None if self.kind == "rotary" else 0
        return _steps.Positions(self.tensors.get("sin"), self.tensors.get("cos"), prefix)

    @property
    def head_norms(self) -> dict[str, Any]:
        """Keywords of `HeadNorms`, and of `ops.rotary_qkv`."""
        vectors = {name: each for name, each in self.tensors.items() if name[:2] in ("q_", "k_")}
        norm = {"head norms": "layer_norm", "packed": "rms_norm"}.get(self.kind)
        return {"half": self.kind != "packed", "norm": norm, **vectors} if "rotary_qkv" in OPS[self.kind] else {}

    def apart(self) -> Results:
        """By the public ops."""
        given = self.tensors
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        keep = given["x"].dtype == torch.float64
        total, normed = (vk.ops.add_rms_norm if self.rms else vk.ops.add_layer_norm)(
            given["x"],
            given.get("branch"),
            given.get("weight"),
            bias=given.get("bias"),
            eps=1e-5,
            out_dtype=None if keep else autocast,
            **{name: given[name] for name in FACTORS if name in given},
        )
        w1, b1, w2, b2 = (given.get(name) for name in ("w1", "b1", "w2", "b2"))
        assert w1 is not None
        if self.kind == "linear":
            return total, vk.ops.linear(normed, w1, b1)
        assert w2 is not None
        if self.kind == "glu_mlp apart":
            weights, biases = (w1, given["w_up"]), (b1, given.get("b_up"))
            return total, vk.ops.glu_mlp(normed, weights, biases, w2, b2, activation=self.activation)
        if self.kind in FEED_FORWARDS:
            return total, getattr(vk.ops, self.kind)(normed, w1, b1, w2, b2, activation=self.activation)
        shape, places = normed.shape, window_places() if self.kind == "windows" else None
        if places is not None:
            normed = normed.flatten(1, 2)[:, places].view(len(normed) * WINDOWS.per_image, WINDOWS.tokens, D)
        qkv = vk.ops.linear(normed, w1, b1)
        if self.head_norms:
            parted = qkv.view(*((1, -1) if self.images else qkv.shape[:2]), 3, H, D // H)
            sin, cos = given.get("sin"), given.get("cos")
            turned = vk.ops.rotary_qkv(parted, sin, cos, prefix=2 if self.kind == "rotary" else 0, **self.head_norms)
            qkv = turned.view(qkv.shape)
        if self.images is not None:
            heads = vk.ops.attention_varlen(qkv.view(-1, 3, H, D // H), *self.images, is_causal=self.causal)
            return total, vk.ops.linear(heads.view(shape), w2, b2)
        heads = vk.ops.attention_qkv(qkv, H, attn_mask=given.get("mask"), is_causal=self.causal)
        out = vk.ops.linear(heads, w2, b2)
        return total, out if places is None else out.view(-1, *places.shape, D)[:, places.argsort()].view(shape)

    def gradients(self, results: Results, use: str = "both", **options: Any) -> dict[str, Tensor | None]:
        """Of every tensor that learns, from a loss that weighs all numbers of one of the results or of both."""
        total, product = results
        used = {"both": results, "total": (total,), "product": (product,)}[use]
        learn = self.learn
        used = tuple(each for each in used if each.requires_grad)
        if not used:
            return dict.fromkeys(learn)
        grads = torch.autograd.grad(
            used, list(learn.values()), [weights_like(each) for each in used], allow_unused=True, **options
        )
        return dict(zip(learn, grads, strict=True))


def window_places() -> Tensor:
    """Where each token of the windows stands in the image: window by window, row by row."""
    (down, right), shift = WINDOWS.size, [-each for each in WINDOWS.shift]
    image = torch.arange(WINDOWS.sides[0] * WINDOWS.sides[1]).view(WINDOWS.sides).roll(shift, (0, 1))
    return image.unfold(0, down, down).unfold(1, right, right).flatten()


def weights_like(tensor: Tensor) -> Tensor:
    return torch.linspace(-1, 1, tensor.numel()).sin().view_as(tensor).to(tensor.dtype)


def norms(calls: list[vk.Call]) -> int:
    """Forward launches of add_layer_norm."""
    return sum((call.op, call.direction) == ("add_layer_norm", "forward") for call in calls)


def launches(calls: list[vk.Call]) -> tuple[list[str], list[str]]:
    """The ops of a step's calls: forward in order, backward in any."""
    forward = [call.op for call in calls if call.direction == "forward"]
    return forward, sorted(call.op for call in calls if call.direction == "backward")


def check_equal(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """The same bits, and None where the other is None."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        mine = got[name]
        if tensor is None or mine is None:
            assert mine is tensor, f"{name}: only one of the two has a gradient"
        else:
            assert mine.dtype == tensor.dtype, name
            assert torch.equal(mine, tensor), f"{name}: {(mine - tensor).abs().max()}"


def keep_smaller_norms(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Keep the results of norms of fewer elements, and make all others again in backward."""
    monkeypatch.setattr(_step, "_SMALL", elements)
    dispatch.backends_changed()  # what calls have settled, they settle anew
