"""`mep fit`: what it makes of recipes and settings."""

import csv
import shlex
from pathlib import Path

import torch
import yaml

from mep_lightning import defaults
from mep_lightning.cli import main
from mep_lightning.commands.keeping import RunLog
from mep_lightning.run_folder import RunFolder


def test_fit_leaves_everything_in_the_runs_folder(trained):
    made = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert made >= {
        "config.yaml",
        "checkpoints/last.ckpt",
        "adapter/learned_embeds.safetensors",
        "samples/before.png",
        "samples/after.png",
        "samples/before_after.png",
        "memory.json",
        "memory.png",
        "log.csv",
        "report.html",
    }
    assert not [name for name in made if "tmp" in name]


def test_config_yaml_holds_what_auto_became(config_of, trained):
    from mep_lightning import defaults

    config, values = config_of(trained), defaults.lookup("zoodip", "tiny", "int8")
    assert config["model"]["lr"] == values["lr"]
    assert config["model"]["eps"] == values["eps"]
    assert config["model"]["estimator"]["init_args"]["mu"] == values["mu"]
    assert config["data"]["resolution"] == 64
    assert config["data"]["class_word"] == "ball"
    (puts,) = config["trainer"]["callbacks"]
    assert puts["init_args"] == {"low": values["puts_low"], "high": values["puts_high"]}


def test_max_steps_auto_is_the_methods_own_number(config_of, quick):
    from mep_lightning import defaults

    assert main(["fit", "--config", "zoodip", "--run", "r", *quick, "--trainer.fast_dev_run", "true"]) == 0
    assert config_of("r")["trainer"]["max_steps"] == defaults.lookup("zoodip", "tiny", "int8")["max_steps"]


def test_runs_are_numbered_and_the_embedded_base_is_announced(fit, capsys):
    assert fit(steps=1) == fit(steps=1) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["zoodip-1", "zoodip-2"]
    assert "No --model.base given: taking the embedded base, tiny." in capsys.readouterr().out


def test_parts_are_swapped_by_name_and_the_rest_is_kept(fit, config_of):
    words = ("--model.estimator", "SPSAEstimator", "--model.estimator.n", "4", "--model.subspace.init_args.tau", "64")
    assert fit("--run", "r", *words, steps=1) == 0
    model = config_of("r")["model"]
    assert model["estimator"]["class_path"].endswith(".SPSAEstimator")
    assert model["estimator"]["init_args"]["n"] == 4
    assert model["estimator"]["init_args"]["normalize"] is True  # the recipe's, which fits SPSA too
    assert model["subspace"]["init_args"] == {"tau": 64, "nu": defaults.lookup("zoodip", "tiny", "int8")["nu"]}


def test_swapping_in_a_part_with_other_settings_drops_only_what_does_not_fit(fit, config_of):
    assert fit("--run", "r", "--model.estimator", "Backprop", "--model.subspace", "null", steps=1) == 0
    model = config_of("r")["model"]
    assert model["estimator"]["class_path"].endswith(".Backprop")
    assert "mu" not in (model["estimator"].get("init_args") or {})
    assert model["subspace"] is None
    assert model["method"] == "zoodip"


def test_a_callback_of_ones_own_leaves_the_others_in_place(fit, config_of):
    Path("mine.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: LearningRateMonitor\n")
    assert fit("--config", "mine.yaml", "--trainer.callbacks+=Timer", "--run", "r", steps=1) == 0
    names = [part["class_path"].rpartition(".")[2] for part in config_of("r")["trainer"]["callbacks"]]
    assert names == ["PUTS", "LearningRateMonitor", "Timer"]
    assert Path("r/samples/after.png").exists()
    assert Path("r/adapter/learned_embeds.safetensors").exists()


def test_a_list_of_callbacks_in_a_recipe_cannot_lose_what_every_run_needs(fit):
    Path("mine.yaml").write_text("trainer:\n  callbacks: [{class_path: Timer}]\n")
    assert fit("--config", "mine.yaml", "--run", "r", steps=1) == 0
    assert Path("r/checkpoints/last.ckpt").exists()
    assert Path("r/memory.json").exists()


def test_later_recipes_win_and_the_command_line_wins_over_all(fit, config_of):
    Path("a.yaml").write_text("model: {lr: 0.1, seed: 1}")
    Path("b.yaml").write_text("model: {lr: 0.2}")
    assert fit("--model.seed", "5", "--config", "a.yaml", "--config", "b.yaml", "--run", "r", steps=1) == 0
    model = config_of("r")["model"]
    assert (model["lr"], model["seed"]) == (0.2, 5)


def test_a_run_can_be_used_as_a_recipe(checkpoint, trained):
    assert main(["fit", "--config", str(trained / "config.yaml"), "--run", "again"]) == 0
    assert torch.equal(*(checkpoint(run)["state_dict"]["adapter.theta"] for run in (trained, "again")))


def test_photos_are_found_again_from_another_folder(fit, config_of, photo_folder, monkeypatch):
    monkeypatch.chdir(photo_folder.parent)
    assert fit("--data.path", "photos", "--data.class_word", "ball", "--run", "r", steps=1) == 0
    assert config_of("r")["data"]["path"] == str(photo_folder)


def test_another_logger_comes_beside_the_runs_own_log(fit):
    words = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb")
    assert fit("--run", "r", *words, steps=2) == 0
    assert list(Path("tb").rglob("events.out.tfevents.*"))
    assert Path("r/log.csv").exists()
    (told,) = Path("tb").rglob("hparams.yaml")
    told, values = yaml.safe_load(told.read_text()), defaults.lookup("zoodip", "tiny", "int8")
    assert (told["model.lr"], told["model.estimator.mu"]) == (values["lr"], values["mu"])
    assert (told["data.class_word"], told["trainer.max_steps"]) == ("ball", 2)


def test_a_run_ends_with_its_last_epoch_where_that_comes_first(checkpoint, quick, capsys):
    words = ["fit", "--config", "zoodip", "--run", "r", *quick, "--data.repeats", "1", "--trainer.max_epochs"]
    assert main([*words, "1"]) == 0
    assert "Training for 5 steps." in capsys.readouterr().out  # a step a photo
    assert checkpoint("r")["global_step"] == 5
    assert main(["fit", "--run", "r", "--resume"]) == 0
    assert "Nothing is left to train; add --trainer.max_epochs with a larger number" in capsys.readouterr().out
    assert main(["fit", "--run", "r", "--resume", "--trainer.max_epochs", "2", "--trainer.max_steps", "7"]) == 0
    assert "Resuming at step 5 for 2 steps." in capsys.readouterr().out
    assert checkpoint("r")["global_step"] == 7


def test_the_suggested_command_can_be_pasted(fit, capsys):
    run, token = "my run", "<it's>"
    assert fit("--run", run, "--model.adapter.token", token, steps=1) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    words = shlex.split(line.removeprefix("Next: "))
    assert words == ["mep", "predict", "--run", run, "--prompts", f"a photo of a {token} ball"]


def test_every_logged_step_is_a_row_at_once_and_new_columns_may_come_later():
    """Columns that come later, such as a callback's, are empty in earlier rows; a kill loses no row."""
    log = RunLog(RunFolder(Path("r")))
    for step in range(60):
        log.log_metrics({"train/loss": step / 2} | ({"lr": 1.0} if step == 55 else {}), step)
    rows = list(csv.DictReader(Path("r/log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(60)]
    assert (rows[55]["lr"], rows[54]["lr"], rows[7]["train/loss"]) == ("1.0", "", "3.5")
