"""Wrong input to `mep fit`: one sentence that names the key or file and the mend."""

import re
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from mep_lightning.commands.fit import requested
from mep_lightning.comparison.preflight import Settings


class Absent(CSVLogger):
    """A logger whose package is not there, in Lightning's words."""

    def __init__(self):
        raise ModuleNotFoundError("Requirement 'no-such-package>=1.2' not met. HINT: Try running `pip install -U …`")


class AbsentBar(Callback):
    """A callback whose package is not there, in Lightning's other words."""

    def __init__(self):
        raise ModuleNotFoundError("`AbsentBar` requires `no-such-package` >= 1.2. Install it: `pip install …`.")


FIT_MISTAKES = {
    "no recipe": (
        [],
        "say what to do with --config RECIPE.*selective, textual_inversion, .*zoodip_fast, zoodip_style, models/sd15",
    ),
    "a recipe that stands alone": (["zoodip"], "'zoodip' stands alone; did you mean --config zoodip?"),
    "a second recipe that stands alone": (
        ["--config", "zoodip", "--data.path=.", "mine.yaml"],
        "'mine.yaml' stands alone; did you mean --config mine.yaml?",
    ),
    "a recipe before a plan that takes long": (
        ["--budget", "4GB", "--model.base", "sd15", "lora"],
        "'lora' stands alone; did you mean --config lora?",
    ),
    "an abbreviated setting": (["--config", "zoodip", "--data.class", "dog"], "no option --data.class; did you mean"),
    "an architecture": (["--config", "zoodip", "--model.base", "sd15"], "'sd15' is an .*--config models/sd15"),
    "a budget below a process": (["--budget", "10MB"], "--budget 10MB: a process takes about 512 MiB .*; give more"),
    "unknown recipe": (
        ["--config", "zodip"],
        "--config zodip: neither a file nor a packaged recipe. Did you mean zoodip?",
    ),
    "missing value": (["--config"], "--config: expected one argument"),
    "unknown option": (["--config", "zoodip", "--model.lrr", 1], "no option --model.lrr; did you mean --model.lr?"),
    "own option misspelt": (["--config", "zoodip", "--resum"], "no option --resum; did you mean --resume?"),
    "stray word": (["--config", "zoodip", "fast"], "'fast' stands alone"),
    "wrong type": (["--config", "zoodip", "--model.lr", "fast"], "model.lr is 'fast'; it takes a number or auto."),
    "wrong choice": (
        ["--config", "zoodip", "--model.precision", "int3"],
        "'int3'; it takes fp32, bf16, fp16, int8 or int4.",
    ),
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
        "RandomGradientEstimator takes no 'sigma'; it takes n, mu, normalize, seed, standardize.",
    ),
    "unknown callback": (
        ["--config", "zoodip", "--trainer.callbacks+=Tmer"],
        "no part named 'Tmer'; did you mean Timer?",
    ),
    "16-mixed": (["--config", "zoodip", "--trainer.precision", "16-mixed"], "16-mixed.*32-true, bf16-mixed, bf16-true"),
    "16-mixed in a mapping": (
        ["--config", "zoodip", "--trainer", '{"precision": "16-mixed"}'],
        "16-mixed cannot train this",
    ),
    "16-true": (["--config", "zoodip", "--trainer.precision=16-true"], "16-true.*32-true, bf16-mixed, bf16-true"),
    "no directions": (["--config", "zoodip", "--model.estimator.n", 0], "n is 0.*1, 2, ... directions"),
    "64-true": (
        ["--config", "zoodip", "--trainer.precision=64-true"],
        "64-true cannot train this; choose one of",
    ),
    "no steps": (["--config", "zoodip", "--trainer.max_steps", 0], "trainer.max_steps is 0; use 1 or more, -1"),
    "negative steps": (["--config", "zoodip", "--trainer.max_steps", -7], "trainer.max_steps is -7; use 1 or more, -1"),
    "no batches": (
        ["--config", "zoodip", "--trainer.limit_train_batches", 0],
        "limit_train_batches is 0; use 1",
    ),
    "endless decay": (
        ["--config", "zoodip", "--model.lr_scheduler", "linear", "--trainer.max_steps", -1],
        "lr_scheduler is linear, and trainer.max_steps -1 is no end.*set model.lr_scheduler constant",
    ),
    "schedule": (["--config", "zoodip", "--model.lr_scheduler", "cosin"], "model.lr_scheduler is 'cosin'"),
    "duration": (
        ["--config", "zoodip", "--trainer.max_time", "foo"],
        "is not a valid duration. Expected a string in the format DD:HH:MM:SS.",
    ),
    "resolution": (
        ["--config", "zoodip", "--data.resolution", 100],
        "resolution 100 is not a multiple of 8: use 96 or 104",
    ),
    "no such base": (["--config", "zoodip", "--model.base", "/no/model"], "base '/no/model' is no folder"),
    "unknown method": (["--config", "zoodip", "--model.method", "magic"], "method 'magic' is unknown.*zoodip"),
    "token": (["--config", "zoodip", "--model.adapter.token", "a b"], "the token 'a b' must be one word"),
    "checkpoints": (["--config", "zoodip", "--checkpoint.every", 0], "checkpoint.every is 0.*1 or more"),
    "no such folder": (
        ["--config", "zoodip", "--data.path", "none", "--data.class_word", "dog"],
        "none does not exist: give data.path a folder of JPEG, PNG or WebP photos",
    ),
    "no photos": (
        ["--config", "zoodip", "--data.path", ".", "--data.class_word", "dog"],
        "has no JPEG, PNG or WebP photo in it: put 3 to 10 photos of the subject there",
    ),
    "no class word": (["--config", "zoodip", "--data.path", "."], "data.class_word is missing"),
    "clipping": (
        ["--config", "zoodip", "--trainer.gradient_clip_val", 0.5],
        "trainer.gradient_clip_val is 0.5, and gradients are not clipped; lower model.lr",
    ),
    "accumulation": (
        ["--config", "zoodip", "--trainer.accumulate_grad_batches", 4],
        "trainer.accumulate_grad_batches is 4, and every batch is a step here; raise data.batch_size, or a",
    ),
    "epochs without end": (
        ["--config", "zoodip", "--trainer.max_epochs", 3],
        "trainer.max_epochs is 3, and an epoch of photos never ends; set trainer.max_steps, or data.repeats",
    ),
    "no epochs": (
        ["--config", "zoodip", "--data.repeats", 1, "--trainer.max_epochs", 0],
        "trainer.max_epochs is 0; use 1 or more, or -1 (no end).",
    ),
    "another folder": (
        ["--config", "zoodip", "--trainer.default_root_dir", "out"],
        'trainer.default_root_dir is "out", and a run keeps everything in a folder of its own; name that one',
    ),
    "no checkpoints": (
        ["--config", "zoodip", "--trainer.enable_checkpointing", "false"],
        "trainer.enable_checkpointing is false, and a run is resumed from its checkpoint.*by checkpoint.every",
    ),
    "logger without a folder": (
        ["--config", "zoodip", "--trainer.logger", "TensorBoardLogger"],
        "fit: TensorBoardLogger needs save_dir: add --trainer.logger.save_dir DIR behind it.",
    ),
    "callback without what it watches": (
        ["--config", "zoodip", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks+=Timer"],
        "fit: EarlyStopping needs monitor: add --trainer.callbacks.monitor MONITOR behind it.",
    ),
    "wrong value for the last callback": (
        ["--config", "zoodip", "--trainer.callbacks+=Timer", "--trainer.callbacks.verbose", "x"],
        "trainer.callbacks.verbose is 'x'; it takes true or false.",
    ),
    "strategy": (["--config", "zoodip", "--trainer.strategy", "magic"], "wrong trainer setting.*'magic'"),
    "lr": (["--config", "zoodip", "--model.lr", -1], "model.lr is -1.0; use a number above 0, or auto."),
    "lr of 0": (["--config", "zoodip", "--model.lr", 0], "model.lr is 0.0; use a number above 0, or auto."),
    "lr not a number": (["--config", "zoodip", "--model.lr", ".nan"], "model.lr is nan; use a number above 0"),
    "eps": (["--config", "zoodip", "--model.eps", 0], "model.eps is 0.0; use a number above 0, or auto."),
    "betas": (["--config", "zoodip", "--model.betas", "[0.9, 1]"], "model.betas is (0.9, 1.0); use two numbers from 0"),
    "decay": (["--config", "zoodip", "--model.weight_decay", -0.1], "model.weight_decay is -0.1; use 0 or more."),
    "seed": (["--config", "zoodip", "--model.seed", -1], "model.seed is -1; use 0 to 9223372036854775807."),
    "huge seed": (["--config", "zoodip", "--model.seed", 2**63], "model.seed is 9223372036854775808; use 0 to"),
    "seed of directions": (["--config", "zoodip", "--model.estimator.seed", -1], "Estimator.seed is -1; use 0 to"),
    "seed of all": (["--config", "zoodip", "--seed_everything", -3], "seed_everything is -3; use 0 to 4294967295."),
    "seed of pictures": (["--config", "zoodip", "--samples.seed", 2**63], "samples.seed is 9223372036854775808; use 0"),
    "pictures at once": (
        ["--config", "zoodip", "--samples.batch_size", 0],
        "samples.batch_size is 0; use 1 or more, or auto.",
    ),
    "steps of a picture": (["--config", "zoodip", "--samples.steps", 0], "samples.steps is 0; use 1 or more, or auto."),
    "too many steps": (
        ["--config", "zoodip", "--samples.steps", 1001],
        "samples.steps is 1001; use 1000, the base's timesteps, or less.",
    ),
    "guidance": (["--config", "zoodip", "--samples.guidance", ".nan"], "samples.guidance is nan; use a number."),
    "prompt without the subject": (
        ["--config", "zoodip", "--samples.prompts", '["a <sks> dog", "a dog"]'],
        "samples.prompts: 'a dog' lacks the subject; put {} or <sks> where it goes.",
    ),
    "logger that is not installed": (
        ["--config", "zoodip", "--trainer.logger", "Absent"],
        "Absent needs the package no-such-package, which is not installed; run: pip install no-such-package",
    ),
    "one of several loggers that is not installed": (
        ["--config", "zoodip", "--trainer.logger+=Absent"],
        "Absent needs the package no-such-package, which is not installed; run: pip install no-such-package",
    ),
    "callback that is not installed": (
        ["--config", "zoodip", "--trainer.callbacks+=AbsentBar"],
        "AbsentBar needs the package no-such-package, which is not installed; run: pip install no-such-package",
    ),
    "folder below a file": (["--config", "zoodip", "--run", "a.txt/r"], "a.txt/r cannot be used (Not a directory)"),
    "resume what": (["--resume"], "--resume needs the run to carry on: add --run DIR."),
    "resume nothing": (["--run", "none", "--resume"], "none holds no config.yaml to resume from"),
}


@pytest.mark.parametrize("name", FIT_MISTAKES)
def test_a_mistake_is_answered_with_one_sentence(said, name):
    Path("a.txt").touch()
    words, expected = FIT_MISTAKES[name]
    status, sentence = said(["fit", *words])
    assert re.search(expected if ".*" in expected else re.escape(expected), sentence), sentence
    assert sentence.startswith("mep fit: ")
    assert status == 2
    assert not Path("runs").exists() or not list(Path("runs").iterdir())  # no folder for a run that never began


@pytest.mark.parametrize("word", ["--trainer.logger=TensorBoardLogger", "--trainer.callbacks+=EarlyStopping"])
def test_a_part_that_needs_more_takes_what_is_advised(said, word):
    _, sentence = said(["fit", "--config", "zoodip", word])
    option = re.search(r"add (--\S+) ", sentence)[1]
    words = ["--config", "zoodip", "--run", "r", word, option, "x", "--trainer.callbacks+=Timer"]
    told = Settings(requested(words)[0]).config.trainer.as_dict()
    assert f"'{option.rpartition('.')[2]}': 'x'" in str(told)


def test_photos_are_asked_for_before_gigabytes_are_read(said):
    """The base is told by its JSON files; there are no weights to read here."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        Path("base", part).mkdir(parents=True)
    Path("base/model_index.json").write_text("{}")
    Path("base/unet/config.json").write_text('{"cross_attention_dim": 768, "sample_size": 64}')
    Path("base/vae/config.json").write_text('{"block_out_channels": [1, 2, 3, 4]}')
    Path("base/scheduler/scheduler_config.json").write_text("{}")
    status, sentence = said(["fit", "--config", "zoodip", "--model.base", "base"])
    assert (status, sentence.split(";")[0]) == (2, "mep fit: data.path is missing")


RECIPE_MISTAKES = {
    "model: [": "bad.yaml: line 1: not valid YAML",
    "- a": "bad.yaml: holds list, not settings",
    "model: 3": "bad.yaml: model is 3, not settings; write `model: {...}`.",
    "samples:": "bad.yaml: samples is None, not settings",
    "modell: {lr: 1}": "bad.yaml: there is no setting modell.lr; did you mean model.lr?",
    "model: {lrr: 1}": "bad.yaml: there is no setting model.lrr; did you mean model.lr?",
    "model: {weight_decay: null}": "bad.yaml: model.weight_decay is null; give it a value, or leave it out.",
    "model: {estimator: {init_args: {mu: null}}}": "RandomGradientEstimator.mu is null; give it a value",
    "model: {lr: fast}": "bad.yaml: model.lr is 'fast'; it takes a number or auto.",
    "model: {estimator: {init_args: {n: x}}}": "bad.yaml: model.estimator.n is 'x'; it takes a whole number or auto.",
    "trainer: {precision: 16-mixed}": "bad.yaml: trainer.precision 16-mixed cannot train this",
    "trainer: {callbacks+: [{class_path: EarlyStopping}]}": (
        "bad.yaml: trainer.callbacks: EarlyStopping needs monitor; add it to its init_args."
    ),
    "trainer: {max_epochs: 3}": "bad.yaml: trainer.max_epochs is 3, and an epoch of photos never ends",
    "trainer: {callbacks+: [{class_path: PUTS, init_args: {lo: 3}}]}": "PUTS takes no 'lo'; did you mean low?",
}


@pytest.mark.parametrize("text", RECIPE_MISTAKES)
def test_a_mistake_in_a_recipe_names_the_file_and_the_key(said, text):
    Path("bad.yaml").write_text(text)
    status, sentence = said(["fit", "--config", "zoodip", "--config", "bad.yaml"])
    assert RECIPE_MISTAKES[text] in sentence
    assert status == 2


def test_a_folder_that_is_taken_is_left_alone(said):
    Path("r").mkdir()
    Path("r/thesis.txt").write_text("dear")
    status, sentence = said(["fit", "--config", "zoodip", "--run", "r"])
    assert (status, sentence) == (2, "mep fit: r exists and is not empty; name another folder.")
    assert Path("r/thesis.txt").read_text() == "dear"


def test_a_finished_run_is_not_overwritten(said, trained):
    status, sentence = said(["fit", "--config", "zoodip", "--run", trained])
    assert status == 2
    assert "add --resume to carry it on" in sentence


def test_a_failed_start_frees_the_folders_name(said):
    Path("photos").mkdir()
    Path("photos/a.jpg").write_text("no picture")
    words = ["fit", "--config", "zoodip", "--data.path", "photos", "--data.class_word", "dog", "--run", "r"]
    status, sentence = said(words)
    assert status == 2
    assert "photos/a.jpg cannot be read" in sentence
    assert not Path("r").exists()


def test_a_run_folder_that_is_a_file_is_named(said, tmp_path):
    Path("taken").write_text("")
    status, sentence = said(["fit", "--config", "zoodip", "--run", "taken"])
    assert status == 2 and "taken is a file; name another folder" in sentence


def test_notes_about_photos_do_not_stand_before_the_mistake(said, photo_folder):
    for number in range(3):
        (photo_folder / f"{number}.heic").touch()
    (photo_folder / "zz.jpg").write_text("no picture")
    status, sentence = said(["fit", "--config", "zoodip", "--data.path", photo_folder, "--data.class_word", "ball"])
    assert (status, "zz.jpg cannot be read" in sentence) == (2, True)


def test_a_note_goes_where_results_go(fit, photo_folder, capfd):
    (photo_folder / "0.heic").touch()
    assert fit("--data.path", photo_folder, "--data.class_word", "ball", "--run", "r", steps=1) == 0
    out, err = capfd.readouterr()
    assert "Note: " in out and "0.heic left out: convert to JPEG or PNG" in out
    assert "heic" not in err


def test_a_stray_word_where_there_is_no_option_is_left_out(said):
    assert said(["doctor", "x"]) == (2, "mep doctor: 'x' stands alone; leave it out.")
