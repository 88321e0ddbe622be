"""`mep doctor`: versions, devices and kernels."""

import re
import shlex

import pytest
import torch

from mep_lightning.cli import main
from mep_lightning.commands.doctor import OPTIONAL


def test_doctor_shows_versions_devices_and_every_kernel(capsys):
    from mep_lightning import kernels

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown
    assert "cpu" in shown
    known = [name for name in kernels.__all__ if hasattr(getattr(kernels, name), "reference")]
    assert all(re.search(rf"^  {name}  +active: ", shown, re.MULTILINE) for name in known)
    assert re.search(r"^  triton  +not in use: ", shown, re.MULTILINE) or torch.cuda.is_available()


@pytest.mark.parametrize("words", [words for words in OPTIONAL.values() if words.startswith("--trainer")])
def test_what_a_package_is_for_can_be_typed_as_it_stands(words):
    from mep_lightning.commands.fit import requested
    from mep_lightning.comparison.preflight import Settings

    logger = Settings(requested(["--config", "zoodip", "--run", "r", *shlex.split(words)])[0]).config.trainer.logger
    assert logger["class_path"].endswith(shlex.split(words)[1])
