"""The run's folder: names that are never shared, files that are whole or not there."""

import errno
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import mep_lightning
from mep_lightning.errors import UserError
from mep_lightning.run_folder import LOCK, RunFolder, held, replacing, write_atomically


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


@pytest.mark.parametrize(("made", "empty"), [((), True), (("config.yaml",), False), ((LOCK, ".tmp-1-a.json"), True)])
def test_is_empty(tmp_path, made, empty):
    for name in made:
        (tmp_path / name).touch()
    assert RunFolder(tmp_path).is_empty is empty
    assert RunFolder(tmp_path / "missing").is_empty


def test_leftovers_of_a_kill_are_nothing_and_are_swept(tmp_path):
    run = RunFolder(tmp_path / "run")
    for path in (run.root / ".tmp-1-config.yaml", run.adapter / ".tmp-1-learned_embeds.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    run.adapter.rename(run.root / ".tmp-adapter")
    assert run.is_empty
    (run.root / ".tmp-adapter").rename(run.adapter)
    assert not run.is_empty
    run.config.write_text("whole")
    run.sweep()
    assert [path for path in run.root.rglob("*") if path.is_file()] == [run.config]


def test_who_comes_second_is_told_and_what_was_there_stays(tmp_path):
    write_atomically(tmp_path / "a.json", "{}")
    with held(tmp_path, "first"):
        with pytest.raises(UserError, match="it is taken"), held(tmp_path, "it is taken"):
            pass
        with pytest.raises(UserError, match="it is taken"), held(tmp_path, "it is taken", patience=0.1):
            pass
    with held(tmp_path, "it is taken"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "a.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_held_is_made_and_gone_again_where_nothing_came_of_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    with held(folder, ""):
        assert RunFolder(folder).is_empty and folder.is_dir()
    assert not folder.exists()


HOLDER = """
import sys, time
from pathlib import Path
from mep_lightning.run_folder import held

with held(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_killed_process_lets_go(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(mep_lightning.__file__).parents[1])}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, env=environment)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="taken"), held(tmp_path, "taken"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK).is_file()
    with held(tmp_path, "taken"):
        pass
    assert not tmp_path.exists()


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_nothing_is_held_and_nothing_left(tmp_path, monkeypatch, answer):
    def refuse(*_):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "a").touch()
    with warnings.catch_warnings(action="error"), held(tmp_path, "first"), held(tmp_path, "second"):
        assert not (tmp_path / LOCK).exists(), "which a kill would leave to be waited for"
    (tmp_path / LOCK).touch()  # of a kill where there were locks
    with held(tmp_path, "first"), held(tmp_path, "second"):
        pass
    with held(tmp_path / "new", "first"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "a"]


def test_who_waits_makes_the_folder_anew_that_the_other_took_away(tmp_path):
    first, entered = held(tmp_path / "a", ""), threading.Event()
    first.__enter__()

    def second():
        with held(tmp_path / "a", "taken", patience=20):
            entered.present = (tmp_path / "a" / LOCK).is_file()
            entered.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not entered.wait(0.3)
    first.__exit__(None, None, None)
    waiting.join(20)
    assert entered.is_set() and entered.present


def test_where_nothing_can_be_written_nothing_is_held(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **named)

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "open", refuse)
    with held(tmp_path, "first"), held(tmp_path, "second"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_name_outlasts_a_power_cut_too(tmp_path, monkeypatch):
    """The folder is synced after the rename, and the file before it."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *given: (done.append("renamed"), replace(*given)))
    write_atomically(tmp_path / "a.json", "{}")
    assert done == [False, "renamed", True]


FULL = {
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "python": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("library", FULL)
def test_a_full_disk_is_told_as_the_systems_whatever_the_library_calls_it(tmp_path, library):
    path = write_atomically(tmp_path / "a.ckpt", "old")

    def fill_up():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise FULL[library]

    with pytest.raises(OSError, match="No space left") as told:
        fill_up()
    assert told.value.errno == errno.ENOSPC and Path(told.value.filename).parent == tmp_path
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_on_a_disk_that_is_full_the_old_file_stays(small_disk):
    tensors = {"a": torch.zeros(2**20)}
    writers = {"a.ckpt": lambda to: torch.save(tensors, to), "a.safetensors": lambda to: save_file(tensors, to)}
    writers["a.json"] = lambda to: to.write_bytes(bytes(2**22))
    for name, write in writers.items():
        write_atomically(small_disk / name, "old")

        def replace(name=name, write=write):
            with replacing(small_disk / name) as temporary:
                write(temporary)

        with pytest.raises(OSError, match="No space left") as told:
            replace()
        assert told.value.errno == errno.ENOSPC
        del told  # its frames hold the file that was being written, and with it the disk
        assert (small_disk / name).read_text() == "old"
    assert sorted(path.name for path in small_disk.iterdir()) == sorted(writers)
