"""What is said of who answers for each operation."""

import pytest

from mep_lightning.kernels import status
from mep_lightning.kernels.dispatch import SWITCH


@pytest.mark.parametrize(
    ("why", "switch", "active", "note"),
    [
        ("there is no CUDA device", "auto", "PyTorch", "not in use: there is no CUDA device"),
        (None, "auto", "Triton", "in use; for int8_conv2d and int8_linear too with MEP_KERNELS=triton"),
        (None, "triton", "Triton", None),
    ],
)
def test_status(why, switch, active, note, monkeypatch):
    monkeypatch.setenv(SWITCH, switch)
    monkeypatch.setattr(status, "why_not_triton", lambda: why)
    lines = dict(status.status(["int8_linear", "zo_step_"]))
    assert lines["zo_step_"] == f"active: {active}"
    assert lines["int8_linear"].startswith("active: Triton" if switch == "triton" else "active: PyTorch (")
    assert lines.get("triton") == note
