"""SubjectData: latents equal a direct VAE encode, batches are a pure function of (seed, step), runs resume in place."""

import json
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from PIL import Image

import mep_lightning.tiny
from mep_lightning.data import SubjectData, sample_latents, to_pixels
from mep_lightning.errors import UserError
from mep_lightning.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

NAMES = ["a.png", "b.JPG", "c.webp", "d.png", "e.png"]


@pytest.fixture(scope="module")
def base():
    """What `load_base` returns, as far as the data looks at it: a random VAE of 2 px a latent, 32 px."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).eval()
    return SimpleNamespace(vae=vae, resolution=32, vae_factor=2, device="cpu", family="sd1")


@pytest.fixture
def folder(tmp_path):
    """Five photos of noise, wider than high, in three formats."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def data(folder, base):
    data = SubjectData(folder, class_word="ball", batch_size=2, flip=True)
    data.encode(base)
    return data


def direct_encode(base, path, size=32, mirrored=False):
    """The VAE's posterior of a photo prepared without any code of ours."""
    image = Image.open(path).convert("RGB").crop((5, 0, 45, 40)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = torch.tensor(np.array(image)[:, :: -1 if mirrored else 1].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return base.vae.encode(pixels).latent_dist


# --- latents


@pytest.mark.parametrize("flip", [False, True])
def test_encode_equals_a_direct_encode_at_every_resolution(folder, base, flip):
    data = SubjectData(folder, class_word="ball", flip=flip)
    data.encode(base, resolutions=[16, 32])
    assert set(data.latents) == {16, 32}
    for size, (means, stds) in data.latents.items():
        assert means.shape == stds.shape == (10 if flip else 5, 4, size // 2, size // 2)
        for row in range(len(means)):
            posterior = direct_encode(base, folder / NAMES[row % 5], size, mirrored=row >= 5)
            assert torch.equal(means[row], posterior.mean[0])
            assert torch.equal(stds[row], posterior.std[0])


def test_latents_are_fp32_constants_whatever_the_vae(folder, base):
    data = SubjectData(folder, class_word="ball")
    data.encode(base)
    half = SimpleNamespace(**{**vars(base), "vae": AutoencoderKL.from_config(base.vae.config).to(torch.bfloat16)})
    half.vae.load_state_dict(base.vae.state_dict())
    coarse = SubjectData(folder, class_word="ball")
    coarse.encode(half)
    for exact, rounded in zip(data.latents[32], coarse.latents[32], strict=True):
        assert rounded.dtype == torch.float32
        assert not rounded.requires_grad
        assert not torch.equal(rounded, exact)
        assert torch.allclose(rounded, exact, atol=0.05)


def test_sample_latents_is_the_scaled_draw_of_the_posterior(data, base, folder):
    posterior = direct_encode(base, folder / "a.png")
    drawn = posterior.sample(torch.Generator().manual_seed(3)) * base.vae.config.scaling_factor
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3))
    mean, std = data.at(32, [0])
    assert torch.allclose(sample_latents(mean, std, noise, base.vae.config.scaling_factor), drawn, atol=1e-6)


def test_encode_uses_letterbox_when_asked(folder, base):
    data = SubjectData(folder, class_word="ball", crop="letterbox", resolution=48)
    data.encode(base)
    assert np.array_equal(np.asarray(data.thumbnails(48)[0])[:5], np.full((5, 48, 3), 255))
    with torch.no_grad():
        posterior = base.vae.encode(to_pixels(data.thumbnails(48)[0])[None]).latent_dist
    assert torch.equal(data.latents[48][0][0], posterior.mean[0])


def test_encode_borrows_a_vae_that_has_left(folder, base):
    returned = []

    @contextmanager
    def borrowed_vae(half):
        yield base.vae
        returned.append(half)

    away = SimpleNamespace(vae=None, borrowed_vae=borrowed_vae, resolution=32, vae_factor=2)
    data = SubjectData(folder, class_word="ball")
    data.encode(away)
    assert torch.equal(data.latents[32][0][0], direct_encode(base, folder / "a.png").mean[0])
    assert returned == ["encoder"]


def test_resolution_of_the_user_beats_the_base_and_the_module_beats_both(folder, base):
    data = SubjectData(folder, class_word="ball", resolution=16)
    data.encode(base)
    assert set(data.latents) == {16}
    data.encode(base, resolutions=[24])
    assert set(data.latents) == {24}


def test_a_vae_that_overflows_is_named(folder, base):
    broken = AutoencoderKL.from_config(base.vae.config)
    torch.nn.init.constant_(broken.encoder.conv_in.bias, float("inf"))
    data = SubjectData(folder, class_word="ball")
    with pytest.raises(UserError, match=r"not finite for a\.png in torch\.float32: load the base in fp32"):
        data.encode(SimpleNamespace(vae=broken, resolution=32, vae_factor=2))


def test_small_photos_are_told_about(folder, base):
    with pytest.warns(UserWarning, match=r"a\.png and 4 more: smaller than 48 px, so enlarged"):
        SubjectData(folder, class_word="ball", resolution=48).encode(base)


# --- batches


def test_batch_holds_the_latents_of_its_rows(data):
    batch = data.batch(7)
    assert batch["step"] == 7
    assert len(batch["prompts"]) == 2
    mean, std = data.latents[32]
    assert torch.equal(batch["mean"], torch.stack([mean[r] for r in batch["rows"]]))
    assert torch.equal(batch["std"], torch.stack([std[r] for r in batch["rows"]]))


def test_batches_are_at_the_highest_resolution_and_rows_lead_to_the_others(data, base):
    data.encode(base, resolutions=[16, 32])
    batch = data.batch(0)
    assert batch["mean"].shape == (2, 4, 16, 16)
    low, _ = data.at(16, batch["rows"])
    assert torch.equal(low, data.latents[16][0][batch["rows"]])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7])
def test_every_block_of_draws_shows_each_photo_once(folder, base, batch_size):
    data = SubjectData(folder, class_word="ball", batch_size=batch_size, flip=True)
    data.encode(base)
    photos = [row % 5 for step in range(40) for row in data.batch(step)["rows"]]
    blocks = [photos[i : i + 5] for i in range(0, len(photos) - 4, 5)]
    assert all(sorted(block) == [0, 1, 2, 3, 4] for block in blocks)
    assert len(set(map(tuple, blocks))) > len(blocks) // 2  # and not in one order again and again


def test_draws_do_not_depend_on_the_batch_size(folder, base):
    drawn = []
    for batch_size in (1, 3):
        data = SubjectData(folder, class_word="ball", batch_size=batch_size, flip=True)
        data.encode(base)
        batches = [data.batch(step) for step in range(12 // batch_size)]
        drawn.append([pair for b in batches for pair in zip(b["rows"], b["prompts"], strict=True)])
    assert drawn[0] == drawn[1]


def test_batches_are_a_pure_function_of_seed_and_step(folder, base):
    def draws(seed, steps):
        data = SubjectData(folder, class_word="ball", flip=True, seed=seed)
        data.encode(base)
        return {step: (data.batch(step)["rows"], data.batch(step)["prompts"]) for step in steps}

    torch.manual_seed(1)
    forward = draws(0, range(30))
    torch.manual_seed(2)
    assert draws(0, reversed(range(30))) == forward  # whatever came before, whatever the global generators
    assert draws(1, range(30)) != forward
    # Fixed for ever, so that a run can be resumed with a later version.
    assert [row for step in range(10) for row in forward[step][0]] == [8, 2, 0, 9, 6, 0, 1, 8, 9, 7]
    assert forward[0][1] == ["a photo of a nice {}"]


def test_flips_and_templates_are_spread_evenly(folder, base):
    data = SubjectData(folder, class_word="ball", batch_size=10, flip=True)
    data.encode(base)
    batches = [data.batch(step) for step in range(270)]
    rows = Counter(row for batch in batches for row in batch["rows"])
    assert sorted(rows) == list(range(10))
    assert all(220 < n < 320 for n in rows.values())
    prompts = Counter(prompt for batch in batches for prompt in batch["prompts"])
    assert set(prompts) == set(OBJECT_TEMPLATES)
    assert all(60 < n < 145 for n in prompts.values())


def test_without_flip_no_row_is_mirrored(folder, base):
    data = SubjectData(folder, class_word="ball")
    data.encode(base)
    assert {row for step in range(50) for row in data.batch(step)["rows"]} == {0, 1, 2, 3, 4}


def test_templates_by_name_and_by_hand(folder, base):
    for templates, expected in (("style", set(STYLE_TEMPLATES)), (["one {}", "two {}"], {"one {}", "two {}"})):
        data = SubjectData(folder, class_word="ball", templates=templates)
        data.encode(base)
        assert {data.batch(step)["prompts"][0] for step in range(300)} == expected


def test_captions_take_the_place_of_templates(folder, base):
    (folder / "b.txt").write_text("a red ball by the sea")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "c.webp", "text": "my sks on a table"}))
    data = SubjectData(folder, class_word="ball")
    data.token = "sks"
    data.encode(base)
    prompts = {}
    for step in range(60):
        batch = data.batch(step)
        prompts.setdefault(data.names[batch["rows"][0]], set()).update(batch["prompts"])
    assert prompts["b.JPG"] == {"a red {} by the sea"}
    assert prompts["c.webp"] == {"my {} on a table"}
    assert len(prompts["a.png"]) > 5
    assert prompts["a.png"] <= set(OBJECT_TEMPLATES)


# --- in a trainer


class Recorder(LightningModule):
    """A stranger's module: one parameter, automatic optimisation, remembers what it was fed."""

    def __init__(self, base):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        object.__setattr__(self, "base", base)  # no submodule

    def setup(self, stage):
        self.trainer.datamodule.encode(self.base)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch["step"], batch["rows"], batch["prompts"]))
        self.log("mean", batch["mean"].mean(), batch_size=len(batch["rows"]))
        return (self.weight - batch["mean"].mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 0.1)


def fit(base, data, root, ckpt_path=None, **arguments):
    trainer = Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    module = Recorder(base)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    trainer.save_checkpoint(root / "last.ckpt")
    return module


@pytest.mark.parametrize("repeats", [None, 2])  # endless; epochs of 5 steps
@pytest.mark.parametrize("stop", [8, 10])  # in the middle of an epoch, at its end
def test_a_resumed_run_goes_on_where_it_stopped(folder, base, tmp_path, recwarn, repeats, stop):
    def data():
        return SubjectData(folder, class_word="ball", batch_size=2, flip=True, repeats=repeats)

    whole = fit(base, data(), tmp_path, max_steps=23)
    first = fit(base, data(), tmp_path, max_steps=stop)
    second = fit(base, data(), tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=23)
    assert [step for step, *_ in whole.seen] == [step for _, step, *_ in whole.seen] == list(range(23))
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)
    assert not [w for w in recwarn if "workers" in str(w.message) or "resum" in str(w.message)]


def test_epochs_count_repeats_of_the_photos(folder, base, tmp_path):
    data = SubjectData(folder, class_word="ball", batch_size=2, repeats=3)
    seen = fit(base, data, tmp_path, max_epochs=2).seen
    assert [step for _, step, *_ in seen] == list(range(16))  # 2 x ceil(15 / 2)
    assert len(data.train_dataloader()) == 8


def test_an_epoch_without_end_is_refused_where_the_trainer_waits_for_it(folder, base, tmp_path):
    data = SubjectData(folder, class_word="ball")
    with pytest.raises(UserError, match=r"never ends: give the Trainer max_steps, or data\.repeats a number"):
        fit(base, data, tmp_path, max_epochs=1)
    assert len(fit(base, data, tmp_path, max_epochs=2, limit_train_batches=3).seen) == 6


@pytest.mark.parametrize(("repeats", "limit", "steps"), [(None, 1.0, 20), (None, 2, 6), (1, 1.0, 9)])
def test_early_stopping_is_told_that_it_waits_for_an_epoch_without_end(
    folder, base, tmp_path, recwarn, repeats, limit, steps
):
    data = SubjectData(folder, class_word="ball", batch_size=2, repeats=repeats)
    stopping = EarlyStopping("mean", patience=2, min_delta=1e9)  # nothing is an improvement after the first
    seen = fit(base, data, tmp_path, max_steps=20, limit_train_batches=limit, callbacks=[stopping]).seen
    warned = [w for w in recwarn if "give data.repeats a number" in str(w.message)]
    assert len(warned) == (repeats is None and limit == 1.0)
    assert len(seen) == steps


def test_training_before_encode_says_what_to_call(folder):
    data = SubjectData(folder, class_word="ball")
    with pytest.raises(UserError, match=r"no latents yet: call data\.encode\(base\) in your module's setup"):
        data.train_dataloader()


def test_the_dataloader_works_without_a_trainer(data):
    batches = iter(data.train_dataloader())
    assert [next(batches)["rows"] for _ in range(4)] == [data.batch(step)["rows"] for step in range(4)]


# --- what people see, and what they get wrong


def test_pictures_for_reports(folder, base):
    Image.new("RGB", (3000, 1500), (10, 20, 30)).save(folder / "f.jpg")
    data = SubjectData(folder, class_word="ball")
    assert data.names == [*NAMES, "f.jpg"]
    assert [p.size for p in data.photos] == [(50, 40)] * 5 + [(1024, 512)]
    assert np.array_equal(np.asarray(data.photos[0]), np.asarray(Image.open(folder / "a.png")))
    assert [p.size for p in data.thumbnails(24)] == [(24, 24)] * 6


def test_summary_in_one_line(folder, base):
    (folder / "b.txt").write_text("a red ball by the sea")
    data = SubjectData(folder, class_word="ball", flip=True)
    assert data.summary() == (
        f"5 photos of ball from {folder} (center crop, the base's resolution, 1 caption, 27 templates, half mirrored)"
    )
    data.encode(base)
    assert "32 px" in data.summary()


def test_sample_photos_of_the_tiny_base(base, monkeypatch):
    samples = [(f"{i}.png", Image.new("RGB", (64, 64), (i, 0, 0))) for i in range(3)]
    monkeypatch.setattr(mep_lightning.tiny, "sample_photos", lambda: (samples, "ball"), raising=False)
    data = SubjectData()
    assert (data.class_word, data.names) == ("ball", ["0.png", "1.png", "2.png"])
    assert data.photos[2].getpixel((0, 0)) == (2, 0, 0)
    assert SubjectData(class_word="toy").class_word == "toy"
    data.encode(SimpleNamespace(**{**vars(base), "family": "tiny"}))
    assert data.latents[32][0].shape[0] == 3
    with pytest.raises(UserError, match=r"data\.path is missing: give it a folder of photos"):
        data.encode(base)


def test_a_damaged_photo_is_named_in_setup_before_any_model_is_needed(folder):
    (folder / "c.webp").write_bytes((folder / "c.webp").read_bytes()[:300])
    with pytest.raises(UserError, match=r"c\.webp cannot be read"):
        SubjectData(folder, class_word="ball").setup("fit")


def test_predicting_needs_no_photos(tmp_path):
    SubjectData(tmp_path / "gone").setup("predict")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 500}, "resolution 500 is not a multiple of 8: use 496 or 504"),
        ({"resolution": 4}, "resolution 4 is not a multiple of 8: use 8 or more"),
        ({"crop": "centre"}, 'data.crop is "centre": use center or letterbox'),
        ({"templates": "objects"}, 'data.templates is "objects"'),
        ({"batch_size": 0}, "data.batch_size is 0: use 1 or more"),
        ({"repeats": 0}, "data.repeats is 0: use 1 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SubjectData("photos", class_word="ball", **arguments)


def test_a_missing_class_word_is_named(folder):
    for missing in (None, "", "  "):
        with pytest.raises(UserError, match=r"data\.class_word is missing: say in a word what the photos show"):
            SubjectData(folder, class_word=missing).setup()


def test_a_resolution_the_vae_cannot_encode_is_named(folder, base):
    data = SubjectData(folder, class_word="ball")
    with pytest.raises(UserError, match="resolution 20 is not a multiple of 8: use 16 or 24"):
        data.encode(base, resolutions=[32, 20])
    deep = SimpleNamespace(**{**vars(base), "vae_factor": 16})
    with pytest.raises(UserError, match="resolution 24 is not a multiple of 16: use 16 or 32"):
        data.encode(deep, resolutions=[24])
