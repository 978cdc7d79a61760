"""Fused kernels that make Vision Transformer training faster, behind drop-in PyTorch modules.

Importing this package touches no device, patches nothing and sets no global.
"""

from vitkernels import cli

__version__ = "0.1.0"

cli.answer_at_once()  # before torch is imported

from vitkernels import dispatch, ext, kernels, nn, ops  # noqa: E402
from vitkernels.dispatch import BackendError, Call, backends, record, use  # noqa: E402
from vitkernels.fuse import Explanation, Verification, explain, fuse, register_attention, unfuse, verify  # noqa: E402

kernels.register()
ext.register()
dispatch.add_backend(dispatch.Backend("reference", None, lambda: None))
dispatch.read_environment()

from vitkernels.train.model import load_model  # noqa: E402

__all__ = [
    "BackendError",
    "Call",
    "Explanation",
    "Verification",
    "__version__",
    "backends",
    "explain",
    "fuse",
    "load_model",
    "nn",
    "ops",
    "record",
    "register_attention",
    "unfuse",
    "use",
    "verify",
]
