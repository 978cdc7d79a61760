"""Fused kernels that make Vision Transformer training faster, behind drop-in PyTorch modules.

Importing this package touches no device, patches nothing and sets no global.
"""

from vitkernels import dispatch, ext, kernels, nn, ops
from vitkernels.dispatch import BackendError, Call, backends, record, use
from vitkernels.fuse import Explanation, Verification, explain, fuse, register_attention, unfuse, verify

kernels.register()
ext.register()
dispatch.add_backend(dispatch.Backend("reference", None, lambda: None))
dispatch.read_environment()

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Call",
    "Explanation",
    "Verification",
    "__version__",
    "backends",
    "explain",
    "fuse",
    "nn",
    "ops",
    "record",
    "register_attention",
    "unfuse",
    "use",
    "verify",
]
