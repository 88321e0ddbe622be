"""The `mep` command: what it makes, how it stops and resumes, and what it says to wrong input."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mep_lightning.cli import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
QUICK = [
    *("--samples.count", "1", "--samples.steps", "1", "--samples.every", "0"),
    *("--checkpoint.every", "4", "--model.subspace.tau", "4", "--trainer.log_every_n_steps", "1"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEP_RUN", raising=False)
    monkeypatch.delenv("MEP_DEBUG", raising=False)


def fit(*words, config="zoodip", steps=3):
    return main(["fit", "--config", config, *QUICK, "--trainer.max_steps", str(steps), *map(str, words)])


def config_of(run):
    return yaml.safe_load(Path(run, "config.yaml").read_text())


def checkpoint(run):
    return torch.load(Path(run, "checkpoints/last.ckpt"), weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 10 steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert fit("--run", run, steps=10) == 0
    return run


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["fit", "--help"], ["test", "--help"], ["predict", "--help"], ["doctor", "-h"]]
)
def test_help_answers_at_once_and_without_torch(words):
    code = (
        "import sys\nfrom mep_lightning.cli import main\n"
        f"try: main({words})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert time.monotonic() - started < 3
    assert "usage: mep" in result.stdout


def test_help_names_every_command_and_recipe(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("fit", "test", "predict", "doctor"))
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("quickstart", "zoodip", "textual_inversion", "models/sd15", "--resume"))


def test_help_all_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help-all"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{key}" in shown for key in ("model.lr", "data.class_word", "trainer.max_steps", "samples.every"))


# -- fit -------------------------------------------------------------------------------------------------------------


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


def test_config_yaml_holds_what_auto_became(trained):
    from mep_lightning import defaults

    config, values = config_of(trained), defaults.lookup("zoodip", "tiny", "int8")
    assert config["model"]["lr"] == values["lr"]
    assert config["model"]["eps"] == values["eps"]
    assert config["model"]["estimator"]["init_args"]["mu"] == values["mu"]
    assert config["data"]["resolution"] == 64
    assert config["data"]["class_word"] == "ball"
    (puts,) = config["trainer"]["callbacks"]
    assert puts["init_args"] == {"low": values["puts_low"], "high": values["puts_high"]}


def test_max_steps_auto_is_the_methods_own_number(capsys):
    from mep_lightning import defaults

    assert main(["fit", "--config", "zoodip", "--run", "r", *QUICK, "--trainer.fast_dev_run", "true"]) == 0
    assert config_of("r")["trainer"]["max_steps"] == defaults.lookup("zoodip", "tiny", "int8")["max_steps"]


def test_runs_are_numbered_and_the_embedded_base_is_announced(capsys):
    assert fit(steps=1) == fit(steps=1) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["zoodip-1", "zoodip-2"]
    assert "No --model.base given: taking the embedded base, tiny." in capsys.readouterr().out


def test_parts_are_swapped_by_name_and_the_rest_is_kept():
    words = ("--model.estimator", "SPSAEstimator", "--model.estimator.n", "4", "--model.subspace.init_args.tau", "64")
    assert fit("--run", "r", *words, steps=1) == 0
    model = config_of("r")["model"]
    assert model["estimator"]["class_path"].endswith(".SPSAEstimator")
    assert model["estimator"]["init_args"]["n"] == 4
    assert model["estimator"]["init_args"]["normalize"] is True  # the recipe's, which fits SPSA too
    assert model["subspace"]["init_args"] == {"tau": 64, "nu": 0.001}


def test_swapping_in_a_part_with_other_settings_drops_only_what_does_not_fit():
    assert fit("--run", "r", "--model.estimator", "Backprop", "--model.subspace", "null", steps=1) == 0
    model = config_of("r")["model"]
    assert model["estimator"]["class_path"].endswith(".Backprop")
    assert "mu" not in (model["estimator"].get("init_args") or {})
    assert model["subspace"] is None
    assert model["method"] == "zoodip"


def test_a_callback_of_ones_own_leaves_the_others_in_place():
    Path("mine.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: LearningRateMonitor\n")
    assert fit("--config", "mine.yaml", "--trainer.callbacks+=Timer", "--run", "r", steps=1) == 0
    names = [part["class_path"].rpartition(".")[2] for part in config_of("r")["trainer"]["callbacks"]]
    assert names == ["PUTS", "LearningRateMonitor", "Timer"]
    assert Path("r/samples/after.png").exists()
    assert Path("r/adapter/learned_embeds.safetensors").exists()


def test_a_list_of_callbacks_in_a_recipe_cannot_lose_what_every_run_needs():
    Path("mine.yaml").write_text("trainer:\n  callbacks: [{class_path: Timer}]\n")
    assert fit("--config", "mine.yaml", "--run", "r", steps=1) == 0
    assert Path("r/checkpoints/last.ckpt").exists()
    assert Path("r/memory.json").exists()


def test_later_recipes_win_and_the_command_line_wins_over_all():
    Path("a.yaml").write_text("model: {lr: 0.1, seed: 1}")
    Path("b.yaml").write_text("model: {lr: 0.2}")
    assert fit("--model.seed", "5", "--config", "a.yaml", "--config", "b.yaml", "--run", "r", steps=1) == 0
    model = config_of("r")["model"]
    assert (model["lr"], model["seed"]) == (0.2, 5)


def test_a_run_can_be_used_as_a_recipe(trained):
    assert main(["fit", "--config", str(trained / "config.yaml"), "--run", "again"]) == 0
    assert torch.equal(*(checkpoint(run)["state_dict"]["adapter.theta"] for run in (trained, "again")))


def test_photos_are_found_again_from_another_folder(photo_folder, monkeypatch):
    monkeypatch.chdir(photo_folder.parent)
    assert fit("--data.path", "photos", "--data.class_word", "ball", "--run", "r", steps=1) == 0
    assert config_of("r")["data"]["path"] == str(photo_folder)


def test_another_logger_comes_beside_the_runs_own_log():
    words = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb")
    assert fit("--run", "r", *words, steps=2) == 0
    assert list(Path("tb").rglob("events.out.tfevents.*"))
    assert Path("r/log.csv").exists()


def test_progress_shows_steps_time_left_speed_loss_and_memory(capsys):
    assert fit("--run", "r", steps=3) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"100%.* 3/3 \[\d+:\d+<\d+:\d+, +[\d.]+(step/s|s/step), loss \d\.\d+, \d+\.\d+ GiB\]$", last), last


# -- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """Sends Ctrl-C from within a training step, as often as asked."""
    from mep_lightning import PersonalizationModule

    step = PersonalizationModule.training_step

    def arrange(at=None, times=1, number=signal.SIGINT):
        def interrupted(self, batch, batch_idx):
            result = step(self, batch, batch_idx)
            if self.global_step == at:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
            return result

        monkeypatch.setattr(PersonalizationModule, "training_step", interrupted)

    return arrange


def test_ctrl_c_saves_everything_and_the_resumed_run_is_bitwise_the_same(trained, interrupt, capsys):
    interrupt(at=6)
    assert fit("--run", "r", steps=10) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == ("mep fit: stopped; all is saved up to step 6 of 10. Carry on with: mep fit --run r --resume")
    assert checkpoint("r")["global_step"] == 6
    assert Path("r/adapter/learned_embeds.safetensors").exists()
    assert Path("r/report.html").exists()

    interrupt()  # never again
    assert main(["fit", "--run", str(Path("r").absolute()), "--resume"]) == 0
    once, twice = checkpoint(trained), checkpoint("r")
    assert twice["global_step"] == 10
    assert torch.equal(once["state_dict"]["adapter.theta"], twice["state_dict"]["adapter.theta"])
    for key, value in once["optimizer_states"][0]["state"][0].items():
        assert torch.equal(value, twice["optimizer_states"][0]["state"][0][key])
    for key, value in once["mep"]["subspace"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(twice["mep"]["subspace"][key]))
    assert Path("r/samples/after.png").read_bytes() == (trained / "samples/after.png").read_bytes()


def test_the_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(trained, interrupt):
    interrupt(at=6)
    fit("--run", "r", steps=10)
    interrupt()  # never again
    # Rows after the last checkpoint, as a kill leaves them, are made again and must not stand there twice.
    run = Path("r").absolute()
    with open(run / "log.csv", "a") as file:
        file.write("0,8,9.0,9.0\n")
    assert main(["fit", "--run", str(run), "--resume"]) == 0
    logs = [list(csv.DictReader((path / "log.csv").read_text().splitlines())) for path in (trained, run)]
    assert logs[0] == logs[1]
    assert [int(row["step"]) for row in logs[1]] == list(range(10))


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(interrupt, capsys):
    interrupt(at=6, times=2)
    assert fit("--run", "r", steps=10) == 130
    assert "all is saved up to step 4 of 10" in capsys.readouterr().err
    assert checkpoint("r")["global_step"] == 4


def test_sigterm_saves_too(interrupt):
    interrupt(at=6, number=signal.SIGTERM)
    assert fit("--run", "r", steps=10) == 128 + signal.SIGTERM
    assert checkpoint("r")["global_step"] == 6


def test_ctrl_c_before_the_first_step_leaves_nothing(monkeypatch, capsys):
    from mep_lightning import PersonalizationModule

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PersonalizationModule, "load", interrupted)
    assert fit("--run", "r") == 130
    assert "stopped before the first step; nothing is kept." in capsys.readouterr().err
    assert not Path("r").exists()


def test_the_shells_own_handlers_are_back_after_a_run():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit("--run", "r", steps=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_a_killed_run_resumes_bitwise(trained):
    words = ["fit", "--config", "zoodip", *QUICK, "--trainer.max_steps", "10", "--run", "r"]
    process = subprocess.Popen([sys.executable, "-m", "mep_lightning.cli", *words], env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not Path("r/checkpoints/last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint("r")["global_step"] in (4, 8, 10)
    assert main(["fit", "--run", "r", "--resume"]) == 0
    assert torch.equal(*(checkpoint(run)["state_dict"]["adapter.theta"] for run in (trained, "r")))


def test_a_finished_run_says_how_to_go_on_and_does(trained, tmp_path, capsys):
    shutil.copytree(trained, "moved")  # a run's folder may be moved
    assert main(["fit", "--run", "moved", "--resume"]) == 0
    assert "Nothing is left to train; add --trainer.max_steps" in capsys.readouterr().out
    assert main(["fit", "--run", "moved", "--resume", "--trainer.max_steps", "12"]) == 0
    assert checkpoint("moved")["global_step"] == 12
    assert config_of("moved")["trainer"]["max_steps"] == 12


# -- wrong input -----------------------------------------------------------------------------------------------------


def said(capsys, words):
    """The exit status and the one sentence on stderr."""
    status = main(list(map(str, words)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert 1 <= len(lines) <= 2, lines
    assert not any("Traceback" in line or "usage:" in line for line in lines)
    return status, lines[-1]


FIT_MISTAKES = {
    "no recipe": ([], "say what to do with --config RECIPE.*quickstart, textual_inversion, zoodip, models/sd15"),
    "unknown recipe": (
        ["--config", "zodip"],
        "--config zodip: neither a file nor a packaged recipe. Did you mean zoodip?",
    ),
    "missing value": (["--config"], "--config: expected one argument"),
    "unknown option": (["--config", "zoodip", "--model.lrr", 1], "no option --model.lrr; did you mean --model.lr?"),
    "own option misspelt": (["--config", "zoodip", "--resum"], "no option --resum; did you mean --resume?"),
    "stray word": (["--config", "zoodip", "fast"], "'fast' stands alone"),
    "wrong type": (["--config", "zoodip", "--model.lr", "fast"], "model.lr is 'fast'; it takes a number or auto."),
    "wrong choice": (["--config", "zoodip", "--model.precision", "int3"], "'int3'; it takes fp32, bf16, fp16 or int8."),
    "wrong steps": (
        ["--config", "zoodip", "--trainer.max_steps", "x"],
        "trainer.max_steps is 'x'; it takes a whole number",
    ),
    "unknown part": (
        ["--config", "zoodip", "--model.estimator", "SPSA"],
        "no part named 'SPSA'; did you mean SPSAEstimator?",
    ),
    "unknown argument": (
        ["--config", "zoodip", "--model.estimator.sigma", 2],
        "RandomGradientEstimator takes no 'sigma'; it takes n, mu, normalize, seed.",
    ),
    "unknown callback": (
        ["--config", "zoodip", "--trainer.callbacks+=Tmer"],
        "no part named 'Tmer'; did you mean Timer?",
    ),
    "16-mixed": (["--config", "zoodip", "--trainer.precision", "16-mixed"], "16-mixed.*32-true, bf16-mixed, bf16-true"),
    "16-true": (["--config", "zoodip", "--trainer.precision=16-true"], "16-true.*32-true, bf16-mixed, bf16-true"),
    "no directions": (["--config", "zoodip", "--model.estimator.n", 0], "n is 0.*at least 1"),
    "resolution": (
        ["--config", "zoodip", "--data.resolution", 100],
        "resolution 100 is not a multiple of 8: use 96 or 104",
    ),
    "no such base": (["--config", "zoodip", "--model.base", "/no/model"], "base '/no/model' is no folder"),
    "unknown method": (["--config", "zoodip", "--model.method", "magic"], "method 'magic' is unknown.*zoodip"),
    "token": (["--config", "zoodip", "--model.adapter.token", "a b"], "the token 'a b' must be one word"),
    "checkpoints": (["--config", "zoodip", "--checkpoint.every", 0], "checkpoint.every is 0.*1 or more"),
    "no photos": (["--config", "zoodip", "--data.path", "none"], "none does not exist|class_word"),
    "no class word": (["--config", "zoodip", "--data.path", "."], "data.class_word is missing"),
    "clipping": (["--config", "zoodip", "--trainer.gradient_clip_val", 1], "clipping is not supported.*Remove"),
    "strategy": (["--config", "zoodip", "--trainer.strategy", "magic"], "wrong trainer setting.*'magic'"),
    "resume what": (["--resume"], "--resume needs the run to carry on: add --run DIR."),
    "resume nothing": (["--run", "none", "--resume"], "none holds no config.yaml to resume from"),
}


@pytest.mark.parametrize("name", FIT_MISTAKES)
def test_a_mistake_is_answered_with_one_sentence(name, capsys):
    words, expected = FIT_MISTAKES[name]
    status, sentence = said(capsys, ["fit", *words])
    assert re.search(expected if ".*" in expected or "|" in expected else re.escape(expected), sentence), sentence
    assert sentence.startswith("mep fit: ")
    assert status == 2
    assert not Path("runs").exists() or not list(Path("runs").iterdir())  # no folder for a run that never began


def test_photos_are_asked_for_before_gigabytes_are_read(capsys):
    """The base is told by its JSON files; there are no weights to read here."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        Path("base", part).mkdir(parents=True)
    Path("base/model_index.json").write_text("{}")
    Path("base/unet/config.json").write_text('{"cross_attention_dim": 768, "sample_size": 64}')
    Path("base/vae/config.json").write_text('{"block_out_channels": [1, 2, 3, 4]}')
    Path("base/scheduler/scheduler_config.json").write_text("{}")
    status, sentence = said(capsys, ["fit", "--config", "zoodip", "--model.base", "base"])
    assert (status, sentence.split(";")[0]) == (2, "mep fit: data.path is missing")


RECIPE_MISTAKES = {
    "model: [": "bad.yaml: line 1: not valid YAML",
    "- a": "bad.yaml: holds list, not settings",
    "modell: {lr: 1}": "bad.yaml: there is no setting modell.lr; did you mean model.lr?",
    "model: {lrr: 1}": "bad.yaml: there is no setting model.lrr; did you mean model.lr?",
    "model: {lr: fast}": "bad.yaml: model.lr is 'fast'; it takes a number or auto.",
    "model: {estimator: {init_args: {n: x}}}": "bad.yaml: model.estimator.n is 'x'; it takes a whole number.",
    "trainer: {precision: 16-mixed}": "trainer.precision 16-mixed cannot train this",
    "trainer: {callbacks+: [{class_path: PUTS, init_args: {lo: 3}}]}": "PUTS takes no 'lo'; did you mean low?",
}


@pytest.mark.parametrize("text", RECIPE_MISTAKES)
def test_a_mistake_in_a_recipe_names_the_file_and_the_key(text, capsys):
    Path("bad.yaml").write_text(text)
    status, sentence = said(capsys, ["fit", "--config", "zoodip", "--config", "bad.yaml"])
    assert RECIPE_MISTAKES[text] in sentence
    assert status == 2


def test_a_folder_that_is_taken_is_left_alone(capsys):
    Path("r").mkdir()
    Path("r/thesis.txt").write_text("dear")
    status, sentence = said(capsys, ["fit", "--config", "zoodip", "--run", "r"])
    assert (status, sentence) == (2, "mep fit: r exists and is not empty; name another folder.")
    assert Path("r/thesis.txt").read_text() == "dear"


def test_a_finished_run_is_not_overwritten(trained, capsys):
    status, sentence = said(capsys, ["fit", "--config", "zoodip", "--run", trained])
    assert status == 2
    assert "add --resume to carry it on" in sentence


def test_a_failed_start_frees_the_folders_name(capsys):
    Path("photos").mkdir()
    Path("photos/a.jpg").write_text("no picture")
    words = ["fit", "--config", "zoodip", "--data.path", "photos", "--data.class_word", "dog", "--run", "r"]
    status, sentence = said(capsys, words)
    assert status == 2
    assert "photos/a.jpg cannot be read" in sentence
    assert not Path("r").exists()


def test_a_damaged_checkpoint_is_named(trained, capsys):
    shutil.copytree(trained, "r")
    Path("r/checkpoints/last.ckpt").write_bytes(b"PK\x03\x04 half")
    status, sentence = said(capsys, ["fit", "--run", "r", "--resume"])
    assert status == 2
    assert "r/checkpoints/last.ckpt cannot be read" in sentence
    assert "delete it" in sentence


@pytest.mark.parametrize("key", ["adapter.theta", "mep"])
def test_a_checkpoint_that_lacks_a_key_is_refused(trained, capsys, key):
    shutil.copytree(trained, "r")
    state = checkpoint("r")
    (state["state_dict"] if key in state["state_dict"] else state).pop(key)
    torch.save(state, "r/checkpoints/last.ckpt")
    status, sentence = said(capsys, ["fit", "--run", "r", "--resume", "--trainer.max_steps", "12"])
    assert status == 2
    assert key in sentence


def test_resuming_on_another_precision_is_refused(trained, capsys):
    shutil.copytree(trained, "r")
    words = ["fit", "--run", "r", "--resume", "--trainer.max_steps", "12", "--model.precision", "fp32"]
    status, sentence = said(capsys, words)
    assert status == 2
    assert "precision" in sentence
    assert "int8" in sentence


def test_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(capsys, monkeypatch):
    assert fit("--run", "r", steps=4) == 0
    capsys.readouterr()
    save = torch.save

    def full(obj, path, *args, **kwargs):
        save(obj, path, *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    status = main(["fit", "--run", "r", "--resume", "--trainer.max_steps", "8"])
    assert status == 1
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoint("r")["global_step"] == 4


@pytest.mark.parametrize(
    ("word", "mend"), [("fti", "did you mean fit?"), ("xyzzy", "there are fit, test, predict, doctor.")]
)
def test_an_unknown_command(word, mend, capsys):
    status, sentence = said(capsys, [word])
    assert status == 2
    assert mend in sentence


# -- predict ---------------------------------------------------------------------------------------------------------


def test_predict_draws_the_same_picture_for_the_same_seed(trained, capsys):
    words = [
        "predict",
        "--run",
        str(trained),
        "--steps",
        "2",
        "--count",
        "2",
        "--prompts",
        "a <sks> ball",
        "a {} on grass",
    ]
    assert main([*words, "--out", "a"]) == main([*words, "--out", "b"]) == 0
    names = sorted(path.name for path in Path("a").iterdir())
    assert names == [
        "00-a-sks-ball-seed0.png",
        "00-a-sks-ball-seed1.png",
        "01-a-sks-ball-on-grass-seed0.png",
        "01-a-sks-ball-on-grass-seed1.png",
    ]
    assert all(Path("a", name).read_bytes() == Path("b", name).read_bytes() for name in names)
    picture = Image.open(Path("a", names[2]))
    assert picture.size == (64, 64)
    assert picture.text["prompt"] == "a <sks> ball on grass"
    assert Path("a", names[0]).read_bytes() != Path("a", names[1]).read_bytes()


def test_an_exported_folder_draws_what_the_run_draws(trained):
    Path("export").mkdir()
    Path("export/token.txt").write_text("notes of mine")
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    words = ["--steps", "2", "--prompts", "a <sks> ball"]
    assert main(["predict", "--run", str(trained), *words, "--out", "a"]) == 0
    assert main(["predict", "--run", "export", "--base", "tiny", "--precision", "int8", *words, "--out", "b"]) == 0
    pictures = [Image.open(next(Path(folder).iterdir())).tobytes() for folder in ("a", "b")]
    assert pictures[0] == pictures[1]


def test_a_run_killed_before_its_export_draws_from_its_checkpoint(trained):
    shutil.copytree(trained, "r")
    shutil.rmtree("r/adapter")
    words = ["--steps", "2", "--prompts", "a <sks> ball"]
    assert main(["predict", "--run", str(trained), *words, "--out", "a"]) == 0
    assert main(["predict", "--run", "r", *words, "--out", "b"]) == 0
    pictures = [Image.open(next(Path(folder).iterdir())).tobytes() for folder in ("a", "b")]
    assert pictures[0] == pictures[1]


PREDICT_MISTAKES = {
    "no prompt": (["--run", "RUN"], "--prompts is missing"),
    "no run": (["--prompts", "x"], "--run is missing"),
    "no such run": (["--run", "none", "--prompts", "x"], "none does not exist"),
    "nothing learned": (["--run", ".", "--base", "tiny", "--prompts", "x"], "holds neither learned_embeds.safetensors"),
    "no base": (["--run", "EXPORT", "--prompts", "x"], "says its base; add --base"),
    "unknown token": (["--run", "RUN", "--prompts", "a <sk> ball"], "names <sk>, which"),
    "device": (["--run", "RUN", "--prompts", "x", "--device", "warp"], "--device warp: not on this machine"),
    "seed": (["--run", "RUN", "--prompts", "x", "--seed", "-1"], "--seed is -1; use 0 or more."),
    "count": (["--run", "RUN", "--prompts", "x", "--count", "0"], "--count is 0; use 1 or more."),
    "steps": (["--run", "RUN", "--prompts", "x", "--steps", "0"], "--steps is 0; use 1 or more."),
    "not a number": (["--run", "RUN", "--prompts", "x", "--seed", "a"], "--seed: invalid int value: 'a'"),
    "option": (["--run", "RUN", "--prompts", "x", "--stepz", "1"], "no option --stepz; did you mean --steps?"),
}


@pytest.mark.parametrize("name", PREDICT_MISTAKES)
def test_a_mistake_in_predict_is_answered_with_one_sentence(name, trained, capsys):
    Path("export").mkdir()
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    words, expected = PREDICT_MISTAKES[name]
    words = [{"RUN": trained, "EXPORT": "export"}.get(word, word) for word in words]
    status, sentence = said(capsys, ["predict", *words])
    assert status == 2
    assert expected in sentence


# -- test ------------------------------------------------------------------------------------------------------------


def test_test_scores_the_evaluation_prompts_of_the_base(trained):
    shutil.copytree(trained, "r")
    assert main(["test", "--run", "r", "--images-per-prompt", "1", "--steps", "1"]) == 0
    from mep_lightning.tiny import evaluation_prompts

    metrics = json.loads(Path("r/metrics.json").read_text())
    assert {"clip_t", "clip_i", "dino", "dino_inter"} <= set(metrics)
    assert all(-1 <= metrics[name] <= 1 for name in ("clip_t", "clip_i", "dino", "dino_inter"))
    assert metrics["settings"]["prompts"] == len(evaluation_prompts())
    assert len(list(Path("r/evaluation").glob("*.png"))) == len(evaluation_prompts())
    assert f"{metrics['dino']:.2f}"[:3] in Path("r/report.html").read_text()


def test_test_works_from_an_exported_folder_with_prompts_of_ones_own(trained, photo_folder, capsys):
    Path("export").mkdir()
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    Path("mine.txt").write_text("# two\na {} on grass\n\na photo of a {}\n")
    words = ["test", "--run", "export", "--base", "tiny", "--class-word", "ball", "--data", str(photo_folder)]
    assert main([*words, "--prompts", "mine.txt", "--images-per-prompt", "2", "--steps", "1"]) == 0
    metrics = json.loads(Path("export/metrics.json").read_text())
    assert metrics["settings"]["prompts"] == 2
    assert len(list(Path("export/evaluation").glob("*.png"))) == 4


TEST_MISTAKES = {
    "no photos": (["--run", "EXPORT", "--base", "tiny"], "says where the photos are; add --data DIR."),
    "no prompts file": (["--run", "EXPORT", "--prompts", "none.txt"], "none.txt: cannot be read (No such file"),
    "no prompt": (["--run", "EXPORT", "--prompts", "empty.txt"], "empty.txt: holds no prompt"),
    "number": (["--run", "EXPORT", "--images-per-prompt", "0"], "--images-per-prompt is 0; use 1 or more."),
}


@pytest.mark.parametrize("name", TEST_MISTAKES)
def test_a_mistake_in_test_is_answered_with_one_sentence(name, trained, capsys):
    Path("empty.txt").touch()
    Path("export").mkdir()
    os.link(trained / "adapter/learned_embeds.safetensors", "export/learned_embeds.safetensors")
    words, expected = TEST_MISTAKES[name]
    status, sentence = said(capsys, ["test", *(word.replace("EXPORT", "export") for word in words)])
    assert status == 2
    assert expected in sentence


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_shows_versions_devices_and_every_kernel(capsys):
    from mep_lightning import kernels

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in shown
    assert "cpu" in shown
    assert all(name in shown for name in kernels.__all__)


def test_a_run_folder_that_is_a_file_is_named(tmp_path, capsys):
    Path("taken").write_text("")
    status, sentence = said(capsys, ["fit", "--config", "zoodip", "--run", "taken"])
    assert status == 2 and "taken is a file; name another folder" in sentence


def test_a_refused_resume_leaves_the_settings_as_they_were(trained, capsys):
    shutil.copytree(trained, "kept")
    settings = Path("kept/config.yaml").read_text()
    status, sentence = said(
        capsys, ["fit", "--run", "kept", "--resume", "--trainer.max_steps", 12, "--model.precision", "fp32"]
    )
    assert status == 2 and "precision 'int8', not 'fp32'" in sentence
    assert Path("kept/config.yaml").read_text() == settings


def test_a_settings_file_cannot_make_predict_call_what_it_names(trained, capsys):
    shutil.copytree(trained, "shared")
    settings = yaml.safe_load(Path("shared/config.yaml").read_text())
    settings["model"]["adapter"] = {"class_path": "os.system", "init_args": {"command": "touch called"}}
    Path("shared/config.yaml").write_text(yaml.safe_dump(settings))
    status, sentence = said(capsys, ["predict", "--run", "shared", "--prompts", "a <sks> ball"])
    assert status == 2 and "model.adapter is none of TokenEmbedding" in sentence
    assert not Path("called").exists()
