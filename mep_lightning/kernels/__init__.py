"""The operations that carry the weight: each with its definition in plain PyTorch beside it, as `.reference`."""

from mep_lightning.kernels.attention import attention
from mep_lightning.kernels.attention_tangents import attention_tangents
from mep_lightning.kernels.dequantize import dequantize
from mep_lightning.kernels.geglu import geglu
from mep_lightning.kernels.group_norm import group_norm
from mep_lightning.kernels.int8_conv2d import int8_conv2d
from mep_lightning.kernels.int8_linear import int8_linear, int8_linear_w8a8
from mep_lightning.kernels.norm_tangents import group_norm_tangents, layer_norm_tangents
from mep_lightning.kernels.perturbed_lora_linear import perturbed_lora_linear
from mep_lightning.kernels.philox import philox_normal, philox_normals, philox_uint32
from mep_lightning.kernels.pointwise_tangents import activation_tangents, product_tangents
from mep_lightning.kernels.quantize_rows import quantize_rows
from mep_lightning.kernels.subspace_project import subspace_project_
from mep_lightning.kernels.zo_step import zo_step_

__all__ = [
    "activation_tangents",
    "attention",
    "attention_tangents",
    "dequantize",
    "geglu",
    "group_norm",
    "group_norm_tangents",
    "int8_conv2d",
    "int8_linear",
    "int8_linear_w8a8",
    "layer_norm_tangents",
    "perturbed_lora_linear",
    "philox_normal",
    "philox_normals",
    "philox_uint32",
    "product_tangents",
    "quantize_rows",
    "subspace_project_",
    "zo_step_",
]
