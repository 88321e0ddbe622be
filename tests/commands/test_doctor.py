"""`mep doctor`: versions, devices and kernels."""

import torch

from mep_lightning.cli import main


def test_doctor_shows_versions_devices_and_every_kernel(capsys):
    from mep_lightning import kernels

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown
    assert "cpu" in shown
    assert all(name in shown for name in kernels.__all__ if hasattr(getattr(kernels, name), "reference"))
    assert "triton            not in use: " in shown or torch.cuda.is_available()
