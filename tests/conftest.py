"""What many tests share."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: sums depend on the number of threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports a kernel: Triton decides when it decorates
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # the models are small: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Files with slow tests first: at the end, two processes have little left to wait for each other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What imports made stays: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_base():
    """The embedded base in fp32, loaded once; tests must leave it as it was."""
    from mep_lightning.bases import load_base

    return load_base("tiny")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A small model of SDXL's build; tests must leave it as it was."""
    from tests import sdxl

    path = tmp_path_factory.mktemp("sdxl")
    sdxl.save(path)
    return path


@pytest.fixture(scope="session")
def made_single_files(tmp_path_factory):
    """Small models of each family's build, as folders and as single files; tests must leave them as they were."""
    from tests import single_file

    root = tmp_path_factory.mktemp("single")
    single_file.save(root)
    return root


@pytest.fixture
def single_files(made_single_files, monkeypatch):
    """Those, with small architectures in the place of the packaged ones."""
    from mep_lightning.bases import families

    monkeypatch.setattr(families, "ARCHITECTURES", made_single_files / "architectures")
    return made_single_files


@pytest.fixture
def photo_folder(tmp_path):
    """A folder of the sample subject's photos as mixed files."""
    from mep_lightning.tiny import sample_photos

    folder = tmp_path / "photos"
    folder.mkdir()
    for (name, photo), ending in zip(sample_photos()[0], ("png", "jpg", "webp", "PNG", "jpeg"), strict=True):
        photo.save(folder / f"{name}.{ending}")
    return folder
