"""The run's folder: names that are never shared, files that are whole or not there."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mep_lightning.run_folder import RunFolder, replacing, write_atomically


def test_new_counts_on_past_gaps_and_other_methods(tmp_path):
    assert RunFolder.new(tmp_path / "runs", "zoodip").root.name == "zoodip-1"
    (tmp_path / "runs" / "zoodip-7").mkdir()
    (tmp_path / "runs" / "zoodip-old").mkdir()
    (tmp_path / "runs" / "lora-9").mkdir()
    assert RunFolder.new(tmp_path / "runs", "zoodip").root == tmp_path / "runs" / "zoodip-8"


def test_new_never_gives_a_folder_twice(tmp_path, monkeypatch):
    """Another process may make the same folder between looking and making."""
    mkdir, raced = Path.mkdir, []

    def first_loses(path, *args, **kwargs):
        if path.name == "zoodip-1" and not raced:
            raced.append(path)
            mkdir(path, *args, **kwargs)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", first_loses)
    assert RunFolder.new(tmp_path, "zoodip").root.name == "zoodip-2"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_atomically(tmp_path / "deep" / "a.json", "old")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_file_to_write_keeps_its_suffix(tmp_path):
    """Pillow and safetensors tell formats by it."""
    with replacing(tmp_path / "grid.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"\x89PNG")
    assert (tmp_path / "grid.png").read_bytes() == b"\x89PNG"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_a_file_gets_the_mode_that_the_users_umask_asks_for(tmp_path, umask, mode):
    def write() -> int:
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)  # which makes a file of mode 0600
        return (tmp_path / "a.safetensors").stat().st_mode & 0o777

    before = os.umask(umask)
    try:
        assert write() == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize(("made", "empty"), [((), True), (("config.yaml",), False)])
def test_is_empty(tmp_path, made, empty):
    for name in made:
        (tmp_path / name).touch()
    assert RunFolder(tmp_path).is_empty is empty
    assert RunFolder(tmp_path / "missing").is_empty
