"""torchvision: the blocks of `vision_transformer` (vit_b_16 ... vit_h_14), read from torchvision 0.28.

Their attention is nn.MultiheadAttention, served by the rule in `torch_nn`; their patches are cut by a Conv2d, served by
the one in `shared`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitkernels.fuse.multihead import attention_branch
from vitkernels.fuse.rules import Rule, differs
from vitkernels.fuse.swap import Fused, PreNormBlock, branch_of
from vitkernels.residual import genuine
from vitkernels.residual.stream import Branch, Part, Sublayer
from vitkernels.residual.sublayers import dropped, mlp_branch


class FusedMLP(Fused):
    """torchvision.ops.MLP of two Linears (MLPBlock), a Sequential of Linear, activation, Dropout, Linear, Dropout."""

    reads = ("0",)
    axes = None

    def forward(self, input: Tensor) -> Tensor:
        if self.declines(input):
            return super().forward(input)
        with self.backend():
            return self.branch().run(input, False)[0]

    def branch(self, **options: Any) -> Branch:
        fc1, act, inner, fc2, outer = self.children()
        return dropped(mlp_branch(fc1, act, fc2, inner, ("mlp.0", "mlp.3")), outer)

    def parts(self) -> list[Part]:
        branch = self.branch()
        return [Part("", branch.ops, branch.why_not)]


class FusedEncoderBlock(PreNormBlock):
    """torchvision.models.vision_transformer.EncoderBlock, its adds run with the norms that follow them."""

    reads = ("ln_1",)

    def forward(self, input: Tensor) -> Tensor:
        if self.declines(input):
            return super().forward(input)
        return self.run(input)

    def sublayers(self, **options: Any) -> list[Sublayer]:
        block: Any = self
        attention = attention_branch("self_attention", block.self_attention)
        return [
            Sublayer("self_attention", block.ln_1, dropped(attention, block.dropout)),
            Sublayer("mlp", block.ln_2, branch_of("mlp", block.mlp)),
        ]


def _why_not_two_linears(mlp: nn.Module) -> str | None:
    """In what an MLP is not the one that a Transformer has; None in nothing."""
    kinds = [genuine.owner(child) for child in mlp.children()]
    known = len(kinds) == 5 and kinds[0] is kinds[3] is nn.Linear and kinds[2] is kinds[4] is nn.Dropout
    return None if known else "it is not Linear, activation, Dropout, Linear, Dropout"


MLP = Rule(FusedMLP, frozenset({"torchvision.ops.misc.MLP"}), _why_not_two_linears)
BLOCK = Rule(
    FusedEncoderBlock,
    frozenset({"torchvision.models.vision_transformer.EncoderBlock"}),
    lambda block: differs(block, ("input",), ("ln_1", "self_attention", "dropout", "ln_2", "mlp")),
)
RULES = (BLOCK, MLP)
