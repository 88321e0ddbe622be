"""A few kills: nothing is lost, nothing differs; and what the suite looks at would show it."""

import pytest
import torch
from safetensors.torch import save_file

from mep_lightning.run_folder import RunFolder
from reliability import kill


def figures(rows):
    return {one["metric"]: one["value"] for one in rows}


@pytest.mark.slow
def test_three_kills_lose_nothing_and_change_nothing():
    found = figures(kill.run(kills=3, seed=0, methods=("zoodip",)))
    assert found["kills"] == sum(found[phase] for phase in kill.PHASES) == sum(found[when] for when in kill.WHEN) == 3
    assert (
        found["lost runs"] == found["runs with another export"] == found["half-written files under a final name"] == 0
    )


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.json", "a.yaml", "a.png", "a.html"])
def test_half_a_file_under_its_final_name_is_found_and_a_temporary_is_none(tmp_path, name):
    (tmp_path / f".tmp-1-{name}").write_bytes(b'{"half')
    assert kill.broken(tmp_path) == []
    (tmp_path / name).write_bytes(b'{"half')
    (only,) = kill.broken(tmp_path)
    assert only.startswith(f"{name}: ")


def test_what_is_compared_is_every_bit_of_the_exports(tmp_path):
    run = RunFolder(tmp_path)
    run.adapter.mkdir()
    run.samples.mkdir()
    (run.samples / "after.png").write_bytes(b"x")
    made = []
    for value, metadata in ((1.0, {"a": "b"}), (1.0, {"a": "b"}), (1.0000001, {"a": "b"}), (1.0, {"a": "c"})):
        save_file({"t": torch.tensor([value])}, run.adapter / "learned_embeds.safetensors", metadata)
        made.append(kill.made(run))
    assert made[0] == made[1] and made[0] != made[2] and made[0] != made[3]
