"""A small module and its data: something to train in a hundredth of a second a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import nn

from mep_lightning.run_folder import write_atomically


class Adapter(nn.Module):
    """A trained vector that says how it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(4))

    def phrase(self, class_word: str) -> str:
        return f"<sks> {class_word}".strip()

    def export(self, directory: Path) -> list[Path]:
        path = Path(directory) / "learned_embeds.txt"
        return [write_atomically(path, repr(self.theta.tolist()))]


class Noisy(LightningModule):
    """Manual optimisation that draws from every global generator a training step may use, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.adapter = Adapter()
        self.dropout = nn.Dropout(0.5)
        self.class_word = "ball"
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("no")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.fail_at:
            raise self.error
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = (self.dropout(self.adapter.theta) - torch.rand(4)).pow(2).sum()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.adapter.parameters(), lr=0.1)


class Data(LightningDataModule):
    """Shuffled numbers, and two photos."""

    class_word = "ball"

    @property
    def photos(self) -> list[Image.Image]:
        return [Image.new("RGB", (40, 30), color) for color in ("red", "green")]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.arange(8.0), shuffle=True)


def make_trainer(root: Path, callbacks: list[Any], **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 8,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(default_root_dir=root, callbacks=callbacks, **settings | options)


@pytest.fixture
def module() -> Noisy:
    torch.manual_seed(0)
    return Noisy()


@pytest.fixture
def data() -> Data:
    return Data()


@pytest.fixture
def trainer_of(tmp_path):
    """A Trainer with the given callbacks whose run folder is tmp_path."""

    def make(*callbacks: Any, **options: Any) -> Trainer:
        return make_trainer(tmp_path, list(callbacks), **options)

    return make
