"""What is trained: each adapter says how it is perturbed, saved and exported."""

from mep_lightning.adapters.adapter import Adapter
from mep_lightning.adapters.full import FullUNet
from mep_lightning.adapters.lora import LoRA
from mep_lightning.adapters.scales import QuantizationScales
from mep_lightning.adapters.token import TokenEmbedding
from mep_lightning.adapters.token_and_lora import TokenAndLoRA

__all__ = ["Adapter", "FullUNet", "LoRA", "QuantizationScales", "TokenAndLoRA", "TokenEmbedding"]
