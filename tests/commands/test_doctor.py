"""`mep doctor`: versions, devices and kernels."""

import re

import torch

from mep_lightning.cli import main


def test_doctor_shows_versions_devices_and_every_kernel(capsys):
    from mep_lightning import kernels

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown
    assert "cpu" in shown
    known = [name for name in kernels.__all__ if hasattr(getattr(kernels, name), "reference")]
    assert all(re.search(rf"^  {name}  +active: ", shown, re.MULTILINE) for name in known)
    assert re.search(r"^  triton  +not in use: ", shown, re.MULTILINE) or torch.cuda.is_available()
