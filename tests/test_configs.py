"""The recipes in configs/: every key explained, every one of them runs."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from mep_lightning import PersonalizationModule, SubjectData, defaults
from mep_lightning.callbacks import Samples
from mep_lightning.cli import main
from mep_lightning.commands.recipes import find_recipe, mentions, read_recipe, recipe_names, recipes_folder

RECIPES = recipe_names()
METHODS = [name for name in RECIPES if "/" not in name]


def test_the_recipes_that_documents_promise_are_there():
    methods = {
        "zoodip",
        "zoodip_style",
        "textual_inversion",
        "textual_inversion_lite",
        "lora",
        "lora_r1",
        "selective",
        "hollowed_net",
    }
    assert methods | {
        "zoodip_fast",
        "dreambooth",
        "qlora",
        "peqa",
        "tuneqdm",
        "gf_ti",
        "quickstart",
        "models/tiny",
        "models/sd15",
    } <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_explained_in_a_comment_above_it(name):
    lines = find_recipe(name).read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if re.match(r"\s*(- )?[\w+]+:", line):
            assert re.match(r"\s*# \S.*[.!?:)]$", above), f"{name}: {line.strip()!r} is not explained"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("section", "part"), [("model", PersonalizationModule), ("data", SubjectData)])
def test_a_method_names_everything_that_can_be_set(name, section, part):
    """As a key, or, where a value would undo another recipe's, as an option in a comment."""
    text = find_recipe(name).read_text()
    comments = "".join(line for line in re.findall(r"# .*", text) if not line.startswith("# Use:"))
    named = {*read_recipe(find_recipe(name))[section], *re.findall(rf"--{section}\.(\w+)", comments)}
    assert set(inspect.signature(part).parameters) - named == set()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_it_is_used(name):
    comments = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("# Use: ")]
    assert comments, f"{name} has no line `# Use: mep fit …`"
    assert f"--config {name}" in comments[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_known_and_leaves_to_auto_what_depends_on_the_base(name):
    recipe = read_recipe(find_recipe(name))
    assert recipe["model"]["method"] in defaults.METHODS
    assert recipe["model"]["lr"] == recipe["data"]["resolution"] == "auto"
    assert recipe["trainer"]["max_steps"] == "auto" or recipe["model"].get("base") == "tiny"
    assert recipe["model"]["estimator"].get("init_args", {}).get("mu", "auto") == "auto"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Runs in a folder of their own, without what they show: pictures, the plot of memory and the report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Samples, "_show", lambda *_: None)
    monkeypatch.setattr(Samples, "_compare", lambda *_: None)
    monkeypatch.setattr("mep_lightning.callbacks.memory.write", lambda *_: None)
    monkeypatch.setattr("mep_lightning.commands.training.write_report", lambda *_: None)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_no_key_that_the_command_line_lacks(name):
    """Every key of the recipe is in config.yaml afterwards, with the recipe's value or with what `auto` became."""
    words = ["fit", "--config", name, "--model.base", "tiny", "--run", "r", "--trainer.fast_dev_run", "true"]
    assert main(words) == 0
    recipe, config = read_recipe(find_recipe(name)), yaml.safe_load(Path("r/config.yaml").read_text())
    assert list(differences(recipe, config)) == []


def differences(recipe, config, key=""):
    if isinstance(recipe, dict):
        for name, value in recipe.items():
            yield from differences(value, config[name], f"{key}.{name}")
    elif isinstance(recipe, list) and recipe and isinstance(recipe[0], dict):
        for i, value in enumerate(recipe):
            yield from differences(value, config[i], f"{key}[{i}]")
    elif key.endswith("class_path"):
        if not config.endswith(f".{recipe}"):
            yield key, recipe, config
    elif recipe == "auto":
        if config == "auto" and not key.endswith((".init", ".accelerator", ".activations", ".cuda_graph")):
            yield key, recipe, config
    elif config != recipe:
        yield key, recipe, config


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", [name for name in RECIPES if name.startswith("models/")])
def test_a_base_combines_with_every_method(base, method):
    """Also the parts that a base's recipe sets are kept, whichever comes first; its weights need not be at hand."""
    words = ["fit", "--config", base, "--config", method, "--model.base", "tiny", "--run", "r"]
    assert main([*words, "--trainer.fast_dev_run", "true"]) == 0


def test_a_path_goes_before_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("zoodip").write_text("model: {lr: 1.0}")
    assert read_recipe(find_recipe("zoodip")) == {"model": {"lr": 1.0}}
    assert find_recipe("zoodip.yaml") == recipes_folder() / "zoodip.yaml"


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("model.lr", True),
        ("model.estimator.n", True),
        ("model.estimator.init_args.n", True),
        ("trainer.callbacks.low", True),
        ("model.n", False),
        ("trainer.max_epochs", False),
    ],
)
def test_mentions_finds_a_key_at_its_place_only(key, found):
    recipe = {
        "model": {"lr": 1, "estimator": {"class_path": "E", "init_args": {"n": 2}}},
        "trainer": {"callbacks+": [{"class_path": "PUTS", "init_args": {"low": 1}}]},
    }
    assert mentions(recipe, key) is found
