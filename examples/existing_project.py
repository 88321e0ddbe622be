"""An ordinary LightningModule that takes parts of mep-lightning: zeroth-order gradients, PUTS, the memory profiler.

A small diffusion model of points in the plane learns a circle. Its frozen network is then taught a circle elsewhere:
one conditioning vector is trained, with forward passes only. Run: python examples/existing_project.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mep_lightning import ZerothOrderMixin
from mep_lightning.callbacks import PUTS, MemoryProfiler
from mep_lightning.estimators import RandomGradientEstimator
from mep_lightning.timesteps import UniformTimesteps

STEPS = 1000  # T, of the noise schedule


class PointDiffusion(ZerothOrderMixin, LightningModule):
    """Predicts the noise in noised points.

    Args:
        forward_only: train the conditioning vector alone, without a backward pass; otherwise train everything.
        lr: learning rate.
    """

    def __init__(self, forward_only: bool, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.forward_only, self.lr = forward_only, lr
        self.network = nn.Sequential(
            nn.Linear(2 + 1 + 8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )
        self.condition = nn.Parameter(torch.randn(8))
        self.timesteps = UniformTimesteps(STEPS)  # what the PUTS callback replaces
        self.estimator = RandomGradientEstimator(n=4, mu=1e-2)
        self.network.requires_grad_(not forward_only)

    def loss(self, points: Tensor) -> Tensor:
        """Squared error of the predicted noise; points are [B, 2]."""
        t = self.timesteps.sample(len(points)).to(points.device)  # [B]
        signal = torch.cos(t / STEPS * torch.pi / 2)[:, None]  # [B, 1]
        noise = torch.randn_like(points)
        noisy = signal * points + (1 - signal**2).sqrt() * noise
        features = torch.cat([noisy, t[:, None] / STEPS, self.condition.expand(len(points), -1)], dim=1)  # [B, 11]
        return nn.functional.mse_loss(self.network(features), noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.forward_only:
            loss = self.zo_backward(lambda: self.loss(batch[0]), [self.condition], self.estimator)["loss"]
        else:
            loss = self.loss(batch[0])
            self.manual_backward(loss)
        optimizer.step()
        self.log("train/loss", loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def circle(center: tuple[float, float], count: int = 2048) -> DataLoader:
    """Batches of points on a circle."""
    angle = torch.rand(count) * 2 * torch.pi
    points = torch.stack([angle.cos(), angle.sin()], dim=1) + torch.tensor(center)
    return DataLoader(TensorDataset(points), batch_size=128, shuffle=True)


@torch.no_grad()
def held_out_loss(module: PointDiffusion, center: tuple[float, float]) -> float:
    """The loss on new points, with the same noise every time."""
    torch.manual_seed(1)
    losses = [float(module.loss(points)) for (points,) in circle(center)]
    return sum(losses) / len(losses)


def main(folder: str | Path = "runs/existing_project", pretraining: int = 600, steps: int = 400) -> tuple[float, float]:
    """Returns the held-out loss on the new circle before and after training the conditioning vector."""
    seed_everything(0)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    pretrained = PointDiffusion(forward_only=False, lr=3e-3)
    Trainer(max_steps=pretraining, default_root_dir=folder, **quiet).fit(pretrained, circle((0.0, 0.0)))

    module = PointDiffusion(forward_only=True, lr=5e-2)
    module.load_state_dict(pretrained.state_dict())
    before = held_out_loss(module, (0.6, 0.3))
    callbacks = [PUTS(100, 900), MemoryProfiler()]
    Trainer(max_steps=steps, default_root_dir=folder, callbacks=callbacks, **quiet).fit(module, circle((0.6, 0.3)))
    module.timesteps = UniformTimesteps(STEPS)
    after = held_out_loss(module, (0.6, 0.3))

    print(f"held-out loss {before:.3f} -> {after:.3f} with forward passes only; memory profile in {folder}")
    return before, after


if __name__ == "__main__":
    main()
