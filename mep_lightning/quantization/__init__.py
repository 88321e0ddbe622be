"""Frozen weights in fewer bits: int8 layers that stand in for `nn.Linear` and `nn.Conv2d`."""

from mep_lightning.quantization.int8 import Int8Conv2d, Int8Linear, Int8Weight, quantize_int8
from mep_lightning.quantization.swap import quantize_module_

__all__ = ["Int8Conv2d", "Int8Linear", "Int8Weight", "quantize_int8", "quantize_module_"]
