"""Which cases of the list the extension's CUDA C++ leaves to others, each with the sentence that says so."""

from __future__ import annotations

from case import Case, T

from vitkernels import ext_cuda


def reason_of(case: Case) -> str | None:
    """What `why_not` ends with; None where its kernels serve the case."""
    if case.op in ext_cuda.ABSENT:
        return f"has no {ext_cuda.ABSENT[case.op]} yet"
    if case.op == "add_layer_norm":
        if case.tensors["weight"] is None:
            return "has no LayerNorm without a weight yet"
        if any(len(_shape(case, name)) == 2 for name in ("weight", "scale") if name in case.tensors):
            return "has no weights or scales by sample yet"
    if case.op == "attention" and _shape(case, "q")[1] != _shape(case, "k")[1]:
        return "has no heads of q that share heads of k and v yet"
    if case.op in ("attention", "attention_qkv") and case.tensors.get("attn_mask") is not None:
        mask, batch = _shape(case, "attn_mask"), _shape(case, "q" if case.op == "attention" else "qkv")[0]
        if len(mask) == 4 and mask[0] not in (1, batch):
            return "has no masks of some sequences that serve others in turn yet"
    return None


def _shape(case: Case, name: str) -> tuple[int, ...]:
    given = case.tensors[name]
    assert isinstance(given, T)
    return given.shape
