"""The operations that carry the weight: each with its definition in plain PyTorch beside it, as `.reference`."""

from mep_lightning.kernels.int8_conv2d import int8_conv2d
from mep_lightning.kernels.int8_linear import int8_linear
from mep_lightning.kernels.philox import philox_normal, philox_uint32
from mep_lightning.kernels.subspace_project import subspace_project_

__all__ = ["int8_conv2d", "int8_linear", "philox_normal", "philox_uint32", "subspace_project_"]
