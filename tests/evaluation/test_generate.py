"""Generating pictures: what they depend on, what they do not, and what is in memory when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from mep_lightning import defaults, phases
from mep_lightning.errors import UserError
from mep_lightning.evaluation import generate
from mep_lightning.evaluation.generate import evaluating

PROMPTS = ["a <sks> ball", "a red cube", "a <sks> cat"]


def differ(one: Image.Image, other: Image.Image) -> int:
    """The largest difference between two pictures, in grey levels."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_a_picture_equals_the_samplers_own_loop_written_out(personalised, base):
    """Classifier-free guidance and DPM-Solver++ by hand, from the seed's noise to pixels."""
    (image,) = generate(personalised, PROMPTS[:1], [7], steps=4, guidance=3.0)
    scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    words, nothing = (personalised.condition_on(texts).embeds for texts in (PROMPTS[:1], [""]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            free = base.unet(latents, t, nothing).sample
            guided = free + 3.0 * (base.unet(latents, t, words).sample - free)
            latents = scheduler.step(guided, t, latents).prev_sample
        pixels = base.spare_vae.decode(latents / base.spare_vae.config.scaling_factor).sample[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(image) - expected).max() <= 1.01
    assert expected.std() > 5  # the test would see an empty picture


def test_pictures_do_not_depend_on_the_batch_nor_on_the_order(personalised):
    together = generate(personalised, PROMPTS, [3, 1, 2], steps=3, batch_size=8)
    one_by_one = generate(personalised, PROMPTS, [3, 1, 2], steps=3, batch_size=1)
    turned = generate(personalised, PROMPTS[::-1], [2, 1, 3], steps=3, batch_size=2)[::-1]
    for a, b, c in zip(together, one_by_one, turned, strict=True):
        assert differ(a, b) <= 1
        assert differ(a, c) <= 1


def test_seed_and_prompt_and_token_each_change_the_picture(personalised):
    (image,) = generate(personalised, PROMPTS[:1], [0], steps=3)
    (again,) = generate(personalised, PROMPTS[:1], [0], steps=3)
    (seed,) = generate(personalised, PROMPTS[:1], [1], steps=3)
    (prompt,) = generate(personalised, ["a zebra"], [0], steps=3)
    personalised.theta = 3.0
    (token,) = generate(personalised, PROMPTS[:1], [0], steps=3)
    assert differ(image, again) == 0
    assert min(differ(image, other) for other in (seed, prompt, token)) > 2


def test_global_random_state_is_neither_read_nor_changed(personalised):
    torch.manual_seed(0)
    (first,) = generate(personalised, PROMPTS[:1], [0], steps=2)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    (second,) = generate(personalised, PROMPTS[:1], [0], steps=2)
    assert torch.equal(before, torch.get_rng_state())
    assert differ(first, second) == 0


def test_the_vae_is_borrowed_once_after_the_last_denoising_step_and_given_back(personalised, base, monkeypatch):
    forward = base.unet.forward

    def watched(*args, **kwargs):
        base.events.append("denoise")
        return forward(*args, **kwargs)

    monkeypatch.setattr(base.unet, "forward", watched)
    generate(personalised, PROMPTS, [0, 1, 2], steps=2, batch_size=2)
    assert base.events == ["denoise"] * 4 + ["U-Net parked", "vae borrowed", "vae returned", "U-Net back"]


def test_one_picture_is_decoded_at_a_time(personalised, base, monkeypatch):
    sizes, decode = [], base.spare_vae.decode
    monkeypatch.setattr(base.spare_vae, "decode", lambda z, **k: (sizes.append(tuple(z.shape)), decode(z, **k))[1])
    generate(personalised, PROMPTS, [0, 1, 2], steps=1)
    assert sizes == [(1, 4, 8, 8)] * 3


def test_it_is_the_sample_phase(personalised, monkeypatch):
    seen: list[str] = []

    class Observer:
        def enter(self, name):
            seen.append(f"enter {name}")

        def exit(self, name):
            seen.append(f"exit {name}")

    monkeypatch.setattr(phases, "observers", [Observer()])
    generate(personalised, PROMPTS[:1], [0], steps=1)
    assert seen == ["enter sample", "exit sample"]


def test_no_guidance_means_one_forward_a_step(personalised, base, monkeypatch):
    rows, forward = [], base.unet.forward
    monkeypatch.setattr(base.unet, "forward", lambda x, *a, **k: (rows.append(len(x)), forward(x, *a, **k))[1])
    generate(personalised, PROMPTS, [0, 1, 2], steps=1, guidance=1.0)
    generate(personalised, PROMPTS, [0, 1, 2], steps=1, guidance=2.0)
    assert rows == [3, 6]


def test_progress_counts_pictures(personalised):
    seen = []
    generate(personalised, PROMPTS, [0, 1, 2], steps=1, batch_size=2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 3), (3, 3)]


def test_another_resolution_gives_pictures_of_that_size(personalised):
    (image,) = generate(personalised, PROMPTS[:1], [0], steps=1, resolution=24)
    assert image.size == (24, 24)
    with pytest.raises(UserError, match="resolution 15 is not a multiple of 2"):
        generate(personalised, PROMPTS[:1], [0], resolution=15)


def test_prompts_and_seeds_must_be_as_many(personalised):
    with pytest.raises(UserError, match="3 prompts need as many seeds, and 1 were given"):
        generate(personalised, PROMPTS, [0])


def test_numbers_that_are_not_finite_make_a_warning_and_a_grey_picture(personalised, base, monkeypatch):
    decode = base.spare_vae.decode
    monkeypatch.setattr(base.spare_vae, "decode", lambda z, **k: (decode(z, **k)[0] * float("nan"),))
    with pytest.warns(UserWarning, match="not finite"):
        (image,) = generate(personalised, PROMPTS[:1], [0], steps=1)
    assert set(np.asarray(image).ravel()) <= {127, 128}


def test_modes_are_restored_part_by_part():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()))
    module[1][0].eval()
    before = [part.training for part in module.modules()]
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == before


def test_steps_and_guidance_are_those_of_the_method_on_its_base(personalised, base, monkeypatch):
    calls = []
    handle = base.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(defaults, "of", lambda module: {"sampling_steps": 3, "guidance": 1.0})
    (ours,) = generate(personalised, PROMPTS[:1], [0])
    handle.remove()
    assert len(calls) == 3
    (theirs,) = generate(personalised, PROMPTS[:1], [0], steps=3, guidance=1.0)
    assert differ(ours, theirs) == 0
