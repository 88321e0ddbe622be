"""`mep plan`: its table, its JSON, its picture, and what is said about wrong input."""

import json

import pytest
from PIL import Image

from mep_lightning.cli import main


def test_the_table_says_what_fits(capsys, tmp_path):
    words = ["plan", "--base", "tiny", "--precision", "fp32", "int8", "--budget", "600MB", "--device", "cpu"]
    words += ["--methods", "zoodip", "textual_inversion", "lora"]
    assert main([*words, "--picture", str(tmp_path / "plan.png")]) == 0
    said = capsys.readouterr().out
    assert "Peak memory on tiny at 64 px" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("  ") and " MiB" in line]
    assert [line[:2] for line in lines if line[0] in ("zoodip", "textual_inversion")][:2] == [
        ["zoodip", "fp32"],
        ["textual_inversion", "fp32"],
    ]
    assert "fits: mep fit --config lora --model.base tiny --model.precision fp32" in said
    assert "--trainer.accelerator cpu" in said
    assert Image.open(tmp_path / "plan.png").width > 500


def test_json_holds_the_contracts_keys(capsys):
    words = ["plan", "--base", "tiny", "--precision", "int8", "--methods", "zoodip", "--resolution", "128", "--json"]
    assert main([*words, "--budget", "1GiB"]) == 0
    row, streamed = json.loads(capsys.readouterr().out)["rows"]
    assert streamed["offload"] == "stream" and streamed["peak_bytes"] < row["peak_bytes"]
    assert (row["method"], row["base"], row["precision"], row["resolution"]) == ("zoodip", "tiny", "int8", 128)
    assert (row["offload"], row["checkpointing"], row["fits"]) == ("none", False, True)
    assert list(row["breakdown"]) == ["encode", "load", "step", "denoise", "decode"]
    beside = {name: parts.pop("workspaces") for name, parts in row["breakdown"].items()}
    totals = {name: sum(parts.values()) for name, parts in row["breakdown"].items()}
    assert row["peak_bytes"] == max(totals.values()) == totals[row["peak_phase"]]
    assert row["workspaces_bytes"] == max(totals[name] + beside[name] for name in totals) - row["peak_bytes"] > 0
    assert 0 < row["inference_peak_bytes"] <= row["peak_bytes"]


def test_several_devices_are_planned_one_by_one(capsys):
    words = ["plan", "--base", "tiny", "--precision", "int8", "--methods", "zoodip", "selective", "--devices", "3"]
    assert main([*words, "--device", "cpu", "--budget", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "Peak memory on tiny at 64 px, batch 1, on each of 3 devices, in tensors" in said
    assert [line.split()[:3] for line in said.splitlines() if line.startswith("  zoodip")] == [
        ["zoodip", "int8", "zo_ddp"]
    ]
    assert "--trainer.devices 3 --trainer.strategy zo_ddp" in said
    assert "Without selective: 3 processes cannot share the 2 members of a step: " in said


def test_without_a_budget_nothing_is_said_to_fit(capsys):
    assert main(["plan", "--base", "tiny", "--precision", "int8", "--methods", "zoodip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["fits"] is None


def test_a_budget_for_nothing_says_what_the_least_needs(capsys):
    words = ["plan", "--base", "tiny", "--precision", "int8", "--methods", "zoodip", "lora_r1"]
    assert main([*words, "--budget", "1MB"]) == 0
    assert "Nothing fits into 977 KiB: the least, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--base", "none/of/it"], "base 'none/of/it' is no folder"),
        (["--budget", "much"], "--budget is 'much'; give a size such as 4GB or 3.5GiB."),
        (["--precision", "int3"], "--precision int3 is unknown; choose one of fp32, bf16, fp16, int8, int4."),
        (["--methods", "zoodip,magic"], "--methods magic: there is no such method; choose one of zoodip, "),
        (["--methods", "magic"], "--methods magic: there is no such method; choose one of zoodip, zoodip_fast, "),
        (["--base", "tiny", "--resolution", "100"], "resolution 100 is not a multiple of 8: use 96 or 104"),
        (["--devices", "0"], "--devices 0: a run needs 1 or more."),
        (["--strategy", "ddp"], "--strategy ddp is for several processes; add --devices 2 or more."),
        (
            ["--devices", "2", "--strategy", "fsdp"],
            "--strategy fsdp is unknown; choose one of zo_ddp, zo_ddp_data, ddp.",
        ),
        (
            ["--base", "tiny", "--methods", "zoodip", "--devices", "2", "--strategy", "ddp"],
            "zoodip: trainer.strategy averages gradients over 2 processes, and zoodip has none to average: set",
        ),
        (["--resolution", "big"], "--resolution: invalid int value: 'big'"),
        (["--bas", "tiny"], "there is no option --bas; did you mean --base?"),
    ],
)
def test_mistakes(said, words, sentence):
    status, told = said(["plan", *words])
    assert status == 2
    assert told.startswith(f"mep plan: {sentence}")
