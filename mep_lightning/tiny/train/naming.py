"""How the text encoder learns names: a small network, left out of what ships, turns a look into its name's embedding.

So no two named scenes need share a look, and what a word may mean is learned once for all looks, not name by name; the
same idea lets an encoder personalise from one photo (Gal et al. 2023, arXiv 2302.12228).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mep_lightning.bases.tokens import token_ids
from mep_lightning.tiny.names import LOOK_SIZE, NAMES, describe, looks

NORM = 0.65
"""The length of a name's embedding: about that of the other words', as training leaves them."""


class LookEncoder(nn.Module):
    """Embeddings [N, width] of the names of looks [N, LOOK_SIZE]."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LOOK_SIZE, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, width)
        )

    def forward(self, looks: Tensor) -> Tensor:
        return NORM * F.normalize(self.layers(looks).float(), dim=1)


class NamingTextEncoder(nn.Module):
    """A text encoder that is told whom the name in a caption means, and the network that gives looks their names."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.names = text_encoder, LookEncoder(text_encoder.config.hidden_size)
        self.name_ids = token_ids(tokenizer, list(NAMES))[:, 1]

    def forward(self, ids: Tensor, meant: Tensor) -> Tensor:
        """Hidden states [B, L, D] of ids [B, L], where the first of NAMES means a look of [B, LOOK_SIZE]."""
        embeddings = self.names(meant)[:, None]

        def put(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            return torch.where((ids == self.name_ids[0])[..., None], embeddings, output)

        with self.text_encoder.get_input_embeddings().register_forward_hook(put):
            return self.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def write_names(self) -> None:
        """Give every one of NAMES its look's embedding, for good."""
        table = self.text_encoder.get_input_embeddings().weight
        table[self.name_ids] = self.names(describe(looks()).to(table.device))
