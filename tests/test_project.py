"""What a user installs and what CI runs."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mep_lightning.commands.recipes import recipe_names

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize("text", PROJECT["dependencies"] + [each for extra in EXTRAS.values() for each in extra])
def test_a_dependency_is_open_above_and_its_tested_version_is_pinned(text):
    requirement = Requirement(text)
    assert {part.operator for part in requirement.specifier} == {">="}, "an upper bound would lock users out"
    pinned = pins()[canonicalize_name(requirement.name)]
    (version,) = [part.version for part in pinned.specifier]
    assert requirement.specifier.contains(version, prereleases=True)


def test_constraints_are_exact_and_name_no_registry():
    assert all([part.operator for part in pin.specifier] == ["=="] and pin.url is None for pin in pins().values())
    assert str(pins()["torch"].specifier) == "==2.13.0"
    assert "://" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.slow
def test_the_wheel_carries_recipes_weights_and_the_mep_command(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"mep_lightning/configs/{name}.yaml" for name in recipe_names()} <= names
    weights = {"base/unet/diffusion_pytorch_model.safetensors", "clip/model.safetensors", "dino/model.safetensors"}
    assert {f"mep_lightning/tiny/weights/{name}" for name in weights} <= names
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"mep_lightning"}
    (scripts,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "mep = mep_lightning.cli:main" in (tmp_path / "site" / scripts).read_text()

    # Unpacked on its own, the package finds the recipes inside itself.
    code = "import mep_lightning.commands.recipes as r; print(r.recipes_folder(), *r.recipe_names())"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    ).stdout.split()
    assert shown[0] == str(tmp_path / "site/mep_lightning/configs")
    assert shown[1:] == recipe_names()


@pytest.mark.parametrize("failing", ["lint", "test", "mypy"])
def test_ci_fails_when_any_of_its_steps_fails(failing, tmp_path):
    """Stand-ins for make and python fail at one step."""
    for name in ("make", "python"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/calls\ncase "$*" in *{failing}*) exit 7;; esac\n')
        tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python")}
    assert subprocess.run([ROOT / ".ci/run"], env=environment, check=False).returncode != 0
    assert failing in (tmp_path / "calls").read_text()


def test_ci_runs_lint_mypy_and_tests(tmp_path):
    for name in ("make", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python")}
    assert subprocess.run([ROOT / ".ci/run"], env=environment, check=False).returncode == 0
    assert (tmp_path / "calls").read_text().splitlines() == ["lint", "-m mypy", "test"]


def test_make_offers_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}: ", makefile, re.MULTILINE) for target in ("demo", "test", "lint", "gpu"))


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }
