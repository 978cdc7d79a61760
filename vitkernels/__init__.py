"""Fused kernels that make Vision Transformer training faster, behind drop-in PyTorch modules.

Importing this package touches no device, patches nothing and sets no global.
"""

from vitkernels import ext, kernels, nn, ops
from vitkernels.dispatch import BackendError, Call, backends, record, use

ext.register()
kernels.register()

__version__ = "0.1.0"

__all__ = ["BackendError", "Call", "__version__", "backends", "nn", "ops", "record", "use"]
