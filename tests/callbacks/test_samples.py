"""Sample grids: the right pictures under stable names, and a training run that does not notice them."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from mep_lightning.callbacks import Samples
from mep_lightning.callbacks import samples as samples_module
from mep_lightning.errors import UserError
from mep_lightning.evaluation import OBJECT_PROMPTS, grid
from mep_lightning.run_folder import RunFolder


@pytest.fixture
def calls(monkeypatch):
    """`generate` replaced: pictures show the step's theta and the seed; all global random numbers are disturbed."""
    made = []

    def generate(module, prompts, seeds, **options):
        made.append({"prompts": prompts, "seeds": seeds, "training": module.dropout.training, **options})
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
        torch.rand(7)
        module.dropout(torch.ones(3))
        level = int(module.adapter.theta.detach().abs().sum() * 1000) % 256
        return [Image.new("RGB", (64, 64), (level, seed, 0)) for seed in seeds]

    monkeypatch.setattr(samples_module, "generate", generate)
    return made


def level(theta: torch.Tensor) -> int:
    return int(theta.detach().abs().sum() * 1000) % 256


def names(tmp_path) -> list[str]:
    return sorted(path.name for path in RunFolder(tmp_path).samples.iterdir())


def trained(module_class, data, trainer_of, *callbacks):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    module = module_class()
    trainer = trainer_of(*callbacks)
    trainer.fit(module, data)
    optimizer_state = trainer.optimizers[0].state_dict()["state"][0]
    return module.adapter.theta.detach(), optimizer_state["exp_avg"], torch.rand(1), np.random.rand(), random.random()


def test_training_is_bitwise_the_same_with_samples_and_without(module, data, trainer_of, calls):
    with_samples = trained(type(module), data, trainer_of, Samples(every=3))
    without = trained(type(module), data, trainer_of)
    assert len(calls) == 4  # before, 3, 6, after
    for a, b in zip(with_samples, without, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_the_modules_mode_is_eval_while_sampling_and_train_after(module, data, trainer_of, calls):
    trainer_of(Samples(every=3)).fit(module, data)
    assert not any(call["training"] for call in calls)
    assert module.dropout.training


def test_grids_are_written_before_during_and_after(module, data, trainer_of, calls, tmp_path):
    trainer_of(Samples(every=3)).fit(module, data)
    stems = ["after", "before", "before_after", "photos", "step-000003", "step-000006"]
    assert names(tmp_path) == [f"{stem}.png" for stem in stems]


def test_the_last_step_has_no_grid_beside_after_and_every_0_means_none_between(
    module, data, trainer_of, calls, tmp_path
):
    trainer_of(Samples(every=0), max_steps=2).fit(module, data)
    assert names(tmp_path) == ["after.png", "before.png", "before_after.png", "photos.png"]
    trainer_of(Samples(every=1), max_steps=2).fit(type(module)(), data)
    assert "step-000001.png" in names(tmp_path)
    assert "step-000002.png" not in names(tmp_path)


def test_the_pictures_are_those_of_the_token_at_that_time(module, data, trainer_of, calls, tmp_path):
    trainer_of(Samples()).fit(module, data)
    folder = RunFolder(tmp_path).samples
    before, after = grid.load(folder / "before.png"), grid.load(folder / "after.png")
    red = [shown.cells()[0].getpixel((9, 9))[0] for shown in (before, after)]
    assert red == [level(torch.ones(4)), level(module.adapter.theta)]
    assert (before.info["step"], after.info["step"]) == (0, 8)


def test_prompts_and_seeds_are_the_same_every_time(module, data, trainer_of, calls):
    trainer_of(Samples(every=4, prompts=["a {} on grass", "a red {0} {1}"], seed=10, steps=3, guidance=2.0)).fit(
        module, data
    )
    assert len(calls) == 3
    for call in calls:
        assert call["prompts"] == ["a <sks> ball on grass", "a red <sks> ball"]
        assert call["seeds"] == [10, 11]
        assert (call["steps"], call["guidance"]) == (3, 2.0)


def test_by_default_count_prompts_are_spread_over_the_places_of_the_evaluation_set(module, data, trainer_of, calls):
    trainer_of(Samples(count=3), max_steps=1).fit(module, data)
    chosen = [OBJECT_PROMPTS[i].format("<sks>", "ball") for i in (0, 10, 19)]  # without `a red …`
    assert calls[0]["prompts"] == chosen


def test_more_prompts_than_there_are_is_each_once(module, data, trainer_of, calls):
    trainer_of(Samples(count=1000), max_steps=1).fit(module, data)
    places = [text.format("<sks>", "ball") for text in OBJECT_PROMPTS if text.startswith("a {0}")]
    assert calls[0]["prompts"] == places


def test_before_after_shows_photos_before_and_after_under_one_another(module, data, trainer_of, calls, tmp_path):
    trainer_of(Samples(count=2)).fit(module, data)
    folder = RunFolder(tmp_path).samples
    shown = grid.load(folder / "before_after.png")
    assert [len(row) for row in shown.boxes] == [2, 2, 2]
    assert shown.cells(0)[1].getpixel((96, 96)) == (0, 128, 0)
    for row, name in ((1, "before"), (2, "after")):
        for cell, single in zip(shown.cells(row), grid.load(folder / f"{name}.png").cells(), strict=True):
            assert np.array_equal(np.asarray(cell), np.asarray(single))
    assert [row[0][0] for row in shown.boxes] == [shown.boxes[0][0][0]] * 3  # columns line up


def test_a_resumed_run_keeps_its_first_before(module, data, trainer_of, calls, tmp_path):
    trainer = trainer_of(Samples(), max_steps=4)
    trainer.fit(module, data)
    before = (RunFolder(tmp_path).samples / "before.png").read_bytes()
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    calls.clear()
    trainer_of(Samples(), max_steps=8).fit(type(module)(), data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert len(calls) == 1  # after alone
    assert (RunFolder(tmp_path).samples / "before.png").read_bytes() == before
    assert len(grid.load(RunFolder(tmp_path).samples / "before_after.png").boxes) == 3


def test_without_a_datamodule_there_are_no_photos_and_all_else_is_there(module, data, trainer_of, calls, tmp_path):
    trainer_of(Samples()).fit(module, data.train_dataloader())
    assert names(tmp_path) == ["after.png", "before.png", "before_after.png"]
    assert len(grid.load(RunFolder(tmp_path).samples / "before_after.png").boxes) == 2


def test_photos_are_shown_as_the_model_sees_them_where_the_data_can_tell(module, data, trainer_of, calls, tmp_path):
    data.thumbnails = lambda size: [Image.new("RGB", (size, size), "blue")] * 8
    trainer_of(Samples(), max_steps=1).fit(module, data)
    photos = grid.load(RunFolder(tmp_path).samples / "photos.png")
    assert [len(row) for row in photos.boxes] == [6, 2]
    assert photos.cells(1)[1].getpixel((1, 1)) == (0, 0, 255)


def test_grids_go_to_tensorboard(module, data, trainer_of, calls, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer_of(Samples(every=4), logger=logger).fit(module, data)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 4, 8]


OF_THE_HOST = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.mark.parametrize("full", [torch.OutOfMemoryError("full"), RuntimeError(OF_THE_HOST), MemoryError()])
def test_out_of_memory_while_sampling_is_a_warning_once_training_runs(
    full, module, data, trainer_of, calls, monkeypatch
):
    fake, made = samples_module.generate, []

    def generate(*args, **kwargs):
        made.append(1)
        if len(made) > 1:
            raise full
        return fake(*args, **kwargs)

    monkeypatch.setattr(samples_module, "generate", generate)
    trainer = trainer_of(Samples(every=4))
    with pytest.warns(UserWarning, match="step-000004.png.*batch_size lower"):
        trainer.fit(module, data)
    assert trainer.global_step == 8
    assert module.dropout.training


def test_an_error_before_the_first_step_is_an_error(module, data, trainer_of, monkeypatch):
    monkeypatch.setattr(samples_module, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer_of(Samples()).fit(module, data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": -1}, "every is -1"),
        ({"prompts": []}, "prompts is empty"),
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Samples(**options)


@pytest.mark.parametrize(
    ("prompt", "refused"),
    [("a {} here", False), ("a {0} {1} here", False), ("a <sks>, here", False), ("a dog", True), ("a <sk>", True)],
)
def test_a_prompt_without_the_subject_is_refused_before_anything_is_loaded(module, prompt, refused):
    module.adapter.token = "<sks>"
    with pytest.raises(UserError, match="lacks the subject; put {} or <sks>") if refused else nullcontext():
        Samples(prompts=["a {}", prompt]).setup(None, module, "fit")


@pytest.mark.parametrize("estimator", ["Backprop", "RandomGradientEstimator"])
def test_the_real_module_on_the_embedded_base_trains_to_the_same_bits(trainer_of, tmp_path, estimator):
    from mep_lightning import PersonalizationModule, SubjectData, estimators

    def learned(*callbacks):
        parts = {"Backprop": {}, "RandomGradientEstimator": {"mu": 1e-3}}[estimator]
        module = PersonalizationModule("tiny", "int8", estimator=getattr(estimators, estimator)(**parts))
        torch.manual_seed(0)
        trainer_of(*callbacks, max_steps=4).fit(module, SubjectData())
        return module.adapter.theta.detach().clone()

    with_samples = learned(Samples(every=2, count=1, steps=2))
    assert torch.equal(with_samples, learned())
    assert "step-000002.png" in names(tmp_path)


def test_pictures_of_a_style_read_no_text_encoder_once_the_unet_is_there(trainer_of, monkeypatch):
    from mep_lightning import PersonalizationModule, SubjectData
    from mep_lightning.adapters import LoRA
    from mep_lightning.bases import Base

    unet_is_there, borrow = [], Base.borrowed_text_encoders

    def borrowed(self):
        unet_is_there.append(not next(self.unet.parameters()).is_meta)
        return borrow(self)

    monkeypatch.setattr(Base, "borrowed_text_encoders", borrowed)
    trainer_of(Samples(count=2, steps=1), max_steps=1).fit(
        PersonalizationModule("tiny", "int8", adapter=LoRA(rank=1)), SubjectData(templates="style")
    )
    assert unet_is_there == [False]
