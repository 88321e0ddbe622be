"""`mep fit --budget`, and the plan that is compared with free memory before anything is loaded."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from mep_lightning.bases import identify
from mep_lightning.cli import main
from mep_lightning.commands import budget
from mep_lightning.commands.request import read_request
from mep_lightning.errors import UserError
from mep_lightning.plan import budget as sizes
from mep_lightning.plan import rehearse

INT8 = ("--model.precision", "int8")


SHORT = ("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0", "--trainer.max_steps", "1")


def test_the_plan_chooses_the_recipe_and_says_why(config_of, capsys):
    assert main(["fit", "--budget", "1GB", *INT8, *SHORT, "--trainer.accelerator", "cpu", "--run", "r"]) == 0
    model = config_of("r")["model"]
    assert (model["method"], model["precision"], model["checkpointing"]) == ("lora", "int8", False)
    assert "Into 1GB fits lora in int8: " in capsys.readouterr().out


def test_activations_that_are_named_leave_only_quantised_weights(config_of):
    words = ["--model.activations", "bf16", *SHORT, "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", "zoodip", "--budget", "1GB", *words, "--run", "r"]) == 0
    assert config_of("r")["model"]["precision"] in ("bf16", "int8", "int4")
    assert config_of("r")["model"]["activations"] == "bf16"


@pytest.mark.slow
def test_what_a_user_says_stays(config_of):
    Path("mine.yaml").write_text("model: {seed: 7, precision: int8}\ndata: {flip: true}\ntrainer: {accelerator: cpu}")
    words = ["fit", "--budget", "1GB", "--config", "mine.yaml", "--model.checkpointing", "true", *SHORT]
    assert main([*words, "--run", "r"]) == 0
    config = config_of("r")
    assert (config["model"]["seed"], config["data"]["flip"], config["trainer"]["accelerator"]) == (7, True, "cpu")
    assert (config["model"]["precision"], config["model"]["checkpointing"]) == ("int8", True)


def test_a_method_named_on_the_command_line_gets_its_recipe(config_of):
    assert main(["fit", "--budget", "1GB", "--model.method", "zoodip", *INT8, *SHORT, "--run", "r"]) == 0
    assert config_of("r")["model"]["estimator"]["class_path"].endswith("RandomGradientEstimator")


def test_a_printed_recipe_is_nothing_but_yaml(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--budget", "1GB", *INT8, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["method"] == "lora"


def test_settings_that_break_the_budget_are_refused(said):
    """The plan knew the recipe's own directions; sixty-four of them make another run."""
    words = ["--config", "zoodip", *INT8, "--model.estimator.n", "64", "--budget", "570MB"]
    status, sentence = said(["fit", *words])
    assert status == 2
    assert sentence.startswith("mep fit: with its other settings this run would take ")


def test_a_method_that_is_named_stays(config_of):
    assert main(["fit", "--config", "zoodip", "--budget", "1GB", *INT8, *SHORT, "--run", "r"]) == 0
    assert config_of("r")["model"]["method"] == "zoodip"


TWO = ("--trainer.devices", "2", "--trainer.accelerator", "cpu")


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        (("zoodip", *TWO), "zo_ddp"),
        (("lora", *TWO), "ddp"),
        (("zoodip", *TWO, "--trainer.strategy", "zo_ddp_data"), None),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given or ()),
)
def test_several_processes_get_the_strategy_that_suits_the_method(words, strategy, capsys):
    method, *settings = words
    request = read_request([method], [*settings, *INT8], None, False, chosen=True)
    chosen, _ = budget.choose(request, "1GB")
    assert "beside tensors, on each of 2 devices." in capsys.readouterr().out
    before = [word for word in settings if word.startswith("zo_ddp")]
    assert [chosen.setting("trainer.strategy")] == ([strategy] if strategy else before)
    assert chosen.settings.count("--trainer.strategy") == 1


def test_nothing_fits(said, monkeypatch):
    monkeypatch.setattr(budget, "METHODS", ("zoodip", "peqa", "dreambooth"))
    told = []
    for resolution in ("64", "512"):
        words = ["--data.resolution", resolution, "--model.checkpointing", "true"]
        status, sentence = said(["fit", "--budget", "540MB", *INT8, *words])
        assert status == 2 and sentence.startswith("mep fit: --budget 540MB: the least, ")
        told.append(sentence.partition("; ")[2])
    assert told == ["give more.", "give more, or a lower --data.resolution."]  # pictures have the base's own size


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget", "lots"], "mep fit: --budget is 'lots'; give a size such as 4GB or 3.5GiB."),
        (
            ["--config", "zoodip", "--budget", "1GB", *TWO, "--trainer.strategy", "ddp"],
            "mep fit: --budget 1GB: zoodip: trainer.strategy averages gradients over 2 processes, and zoodip has none",
        ),
        (["--budget", "1GB", "--run", "r", "--resume"], "mep fit: --budget chooses how a run begins; leave it out"),
        (["--budget", "1GB", "--model.method", "magic"], "mep fit: method 'magic' is unknown: choose one of"),
        (
            ["--budget", "1GB", "--model.precision", "int3"],
            "mep fit: precision 'int3' is unknown: choose one of fp32, ",
        ),
        (["--budget", "1GB", "--config", "zoodip", *INT8, "--trainer.devices", "[0"], "mep fit: "),
        (["--budget", "1GB", *INT8, "--model.offload", "stream"], "mep fit: --budget 1GB: no method runs with what is"),
    ],
)
def test_mistakes(said, words, sentence):
    status, told = said(["fit", *words])
    assert status == 2 and told.startswith(sentence)


@pytest.fixture
def crowded(monkeypatch):
    """Ten megabytes are free, and the base is not known to be tiny."""
    monkeypatch.setattr(budget, "identify", lambda name: dataclasses.replace(identify(name), family="sd1"))
    monkeypatch.setattr(budget, "free_bytes", lambda device: 10_000_000)


@pytest.mark.parametrize(("words", "told"), [((), True), (("--print_config",), False)])
@pytest.mark.usefixtures("crowded")
def test_who_waits_for_a_large_base_is_told_why(words, told, monkeypatch, capsys):
    monkeypatch.setattr(budget, "plan", lambda *_, **__: [])
    with pytest.raises(UserError, match="no method runs with what is asked for"):
        budget.choose(read_request([], [*words], None, False, chosen=True), "1GB")
    assert ("Looking for what fits into 1GB" in capsys.readouterr().out) is told


@pytest.mark.usefixtures("crowded")
def test_a_run_that_would_not_fit_is_refused_before_anything_is_loaded(said, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "available_precisions", lambda: ["int8"])
    monkeypatch.setattr(budget, "METHODS", ("zoodip", "lora_r1"))
    monkeypatch.setattr("mep_lightning.module.load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    status, sentence = said(["fit", "--config", "zoodip", *quick, "--run", "r"])
    assert status == 2
    assert sentence.startswith("mep fit: this run would take ")
    assert "and 9.54 MiB are free on cpu: the least, " in sentence
    assert sentence.endswith("; --no-plan tries it all the same.")
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("crowded")
def test_what_would_fit_is_looked_for_in_the_runs_own_sizes(said, monkeypatch):
    asked = []

    def noted(*given, **named):
        asked.append(named)
        return plan(*given, **named)

    plan = budget.plan
    monkeypatch.setattr(budget, "plan", noted)
    monkeypatch.setattr(budget, "available_precisions", lambda: ["int8"])
    monkeypatch.setattr(budget, "METHODS", ("zoodip",))
    sizes = ["--data.batch_size", "3", "--data.resolution", "32", "--samples.batch_size", "2"]
    assert said(["fit", "--config", "zoodip", *sizes, "--run", "r"])[0] == 2
    wanted = {"batch_size": 3, "resolution": 32, "pictures": 2}
    assert asked and all(one.items() >= wanted.items() for one in asked)


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize(("strategy", "shared"), [("zo_ddp", "members"), ("ddp", None)])
def test_a_run_that_is_shared_is_compared_as_such(said, monkeypatch, strategy, shared):
    played = []

    def rehearsed(modules, *given, **named):
        played.extend(module.ranks for module in modules)
        return rehearse(modules, *given, **named)

    monkeypatch.setattr(budget, "rehearse", rehearsed)
    monkeypatch.setattr(budget, "_mend", lambda *_: "less is more")
    words = ["--config", "textual_inversion", *TWO, "--trainer.strategy", strategy, "--samples.count", "1"]
    status, sentence = said(["fit", *words, "--run", "r"])
    assert (
        status == 2 and sentence.startswith("mep fit: this run would take ") and "are free on cpu: less is" in sentence
    )
    assert [(ranks.world, ranks.shared) for ranks in played] == [(2, shared)]


@pytest.mark.usefixtures("crowded")
def test_the_plan_can_be_overruled(fit):
    assert fit("--no-plan", "--run", "r", steps=1) == 0


def test_a_container_leaves_no_more_than_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "CGROUP", tmp_path)
    unlimited = sizes.free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\ninactive_file 400\n")  # files that were read may be dropped
    assert sizes.free_bytes(torch.device("cpu")) == 3400 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert sizes.free_bytes(torch.device("cpu")) > 3400
