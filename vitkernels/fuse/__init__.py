"""One call swaps fused kernels into a model that somebody has, explains itself, and can be undone."""

from vitkernels.fuse.explain import Explanation, explain
from vitkernels.fuse.huggingface import register_attention
from vitkernels.fuse.verification import Verification
from vitkernels.fuse.verify import verify
from vitkernels.fuse.walk import fuse, unfuse

__all__ = ["Explanation", "Verification", "explain", "fuse", "register_attention", "unfuse", "verify"]
