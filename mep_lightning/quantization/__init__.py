"""Frozen weights in fewer bits: int8 and int4 layers that stand in for `nn.Linear` and `nn.Conv2d`."""

from mep_lightning.quantization.int4 import Int4Conv2d, Int4Linear, dequantize_nf4, quantize_nf4, why_not_int4
from mep_lightning.quantization.int8 import Int8Conv2d, Int8Linear, integer_products, quantize_int8
from mep_lightning.quantization.layers import QuantizedWeight
from mep_lightning.quantization.swap import quantize_module_

__all__ = [
    "Int4Conv2d",
    "Int4Linear",
    "Int8Conv2d",
    "Int8Linear",
    "QuantizedWeight",
    "dequantize_nf4",
    "integer_products",
    "quantize_int8",
    "quantize_module_",
    "quantize_nf4",
    "why_not_int4",
]
