"""What is trained: each adapter says how it is perturbed, saved and exported."""

from mep_lightning.adapters.adapter import Adapter
from mep_lightning.adapters.lora import LoRA
from mep_lightning.adapters.token import TokenEmbedding

__all__ = ["Adapter", "LoRA", "TokenEmbedding"]
