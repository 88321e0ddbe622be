"""SDXL: two text encoders, pooled text and picture sizes, in a model of its build and no size; beside diffusers'."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lightning import Trainer
from safetensors.torch import load_file

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, QuantizationScales, TokenEmbedding
from mep_lightning.bases import condition_on, identify, load_base, open_base, predict_noise
from mep_lightning.bases.families import TINY_FOLDER
from mep_lightning.bases.skeleton import architecture
from mep_lightning.bases.weights import vae_dtype
from mep_lightning.errors import UserError
from mep_lightning.estimators import ForwardGradientEstimator, RandomGradientEstimator, SubspaceGradient
from mep_lightning.estimators.perturbation import HERE, direction
from mep_lightning.evaluation import generate
from mep_lightning.plan.rehearsal import made_up_batch
from tests.sdxl import SIDE, WIDTHS, text_config


@pytest.fixture
def folder(sdxl_folder):
    return sdxl_folder


@pytest.fixture
def theirs(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trained(folder, **kwargs):
    """An adapter that has left its place."""
    base = load_base(folder, **kwargs)
    adapter = TokenEmbedding(init="ball", vectors=2)
    adapter.attach(base)
    with torch.no_grad():
        adapter.theta.add_(0.3 * torch.randn(adapter.theta.shape, generator=torch.Generator().manual_seed(0)))
    return base, adapter


def test_is_recognised(folder):
    assert identify(folder).family == "sdxl"


def test_a_folder_without_the_second_encoder_is_refused(folder, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match="lacks unet, .*text_encoder_2, tokenizer_2"):
        load_base(tmp_path)


def test_prompts_mean_what_they_mean_to_diffusers(folder, theirs):
    prompts = ["a photo of a red ball", "grass"]
    with torch.no_grad():
        ours = condition_on(load_base(folder), prompts)
        embeds, _, pooled, _ = theirs.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.embeds, embeds)
    torch.testing.assert_close(ours.pooled, pooled)


def test_a_files_whole_prompt_is_read_where_a_published_folders_is():
    """At the largest id: of another `eos_token_id` it would be at the prompt's end, where no token is trained."""
    said = json.loads((architecture("sdxl") / "text_encoder_2/config.json").read_text())
    assert said["eos_token_id"] == text_config(8).eos_token_id == 2


def test_the_whole_prompt_is_read_at_a_trained_token(folder):
    base = load_base(str(folder), vae=False)
    token = {"<sks>": torch.randn(1, sum(WIDTHS), generator=torch.Generator().manual_seed(0))}
    prompts = [f"a photo of a {word} ball {where}" for word in ("<sks>", "red") for where in ("in snow", "on grass")]
    pooled = condition_on(base, prompts, token).pooled
    assert torch.equal(pooled[0], pooled[1]) and not torch.equal(pooled[2], pooled[3])


def test_the_u_net_is_told_the_pictures_size(folder, theirs):
    base = load_base(folder)
    with torch.no_grad():
        told = condition_on(base, ["a red ball"] * 2)
        latents, timestep = torch.randn(2, 4, 16, 12), torch.tensor([10, 900])
        sizes = theirs._get_add_time_ids((32, 24), (0, 0), (32, 24), told.pooled.dtype, 20).repeat(2, 1)
        added = {"text_embeds": told.pooled, "time_ids": sizes}
        expected = theirs.unet(latents, timestep, told.embeds, added_cond_kwargs=added).sample
        torch.testing.assert_close(predict_noise(base.unet, latents, timestep, told), expected, rtol=1e-4, atol=1e-5)


def test_members_are_told_apart(folder):
    base, adapter = trained(folder)
    prompt, members = ["a photo of a <sks> ball"], torch.stack([adapter.theta, 1.5 * adapter.theta]).detach()
    latents, timestep = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        told = condition_on(base, prompt, adapter.tokens(members))
        together = predict_noise(base.unet, latents, timestep, told)
        for member, found in zip(members, together, strict=True):
            alone = predict_noise(base.unet, latents, timestep, condition_on(base, prompt, adapter.tokens(member)))
            torch.testing.assert_close(found, alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("precision", "make"),
    [
        ("int8", QuantizationScales),
        ("fp32", lambda: LoRA(rank=2, targets=["linear_1"])),
        ("fp32", lambda: LoRA(rank=2, targets=["to_k", "conv_out"])),
    ],
    ids=["scales", "embeddings", "outside the line"],
)
def test_members_of_different_layers_are_told_the_same(folder, precision, make, batch):
    """They part ahead of the time's embedding, which is joined to pooled text: losses are those of one by one."""
    estimator = RandomGradientEstimator(n=2, mu=1e-2)
    module = PersonalizationModule(str(folder), precision, adapter=make(), estimator=estimator)
    module.class_word = "ball"
    module.load()
    mean = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    draw = module.draw({"mean": mean, "std": torch.zeros_like(mean), "prompts": ["a {}", "{} on grass"][:batch]})
    members = estimator.asked(0).drawn_for(module.adapter.numbered())
    with torch.no_grad():
        together = module.losses(members, draw)
        alone = torch.cat([module.losses(members.chosen([place]), draw) for place in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert len(set(together.tolist())) == 3


def guided_by_words(folder, tmp_path):
    """A copy whose guidance starts from the empty prompt's embeddings."""
    other = shutil.copytree(folder, tmp_path / "base")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    return other


def test_what_guidance_starts_from_is_the_bases_to_say(folder, tmp_path):
    other = guided_by_words(folder, tmp_path)
    assert (identify(folder).force_zeros, identify(other).force_zeros, identify("tiny").force_zeros) == (1, 0, 1)
    index = json.loads((other / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    assert identify(other).force_zeros  # as diffusers has it


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_starts_from_what_it_does_in_diffusers(folder, tmp_path, zeros):
    path = folder if zeros else guided_by_words(folder, tmp_path)
    pipe, base = StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False), load_base(path)
    assert pipe.config.force_zeros_for_empty_prompt == zeros
    assert base.pipeline(None).config.force_zeros_for_empty_prompt == zeros
    with torch.no_grad():
        _, embeds, _, pooled = pipe.encode_prompt("a red ball")
        nothing = condition_on(base, [""]).nothing()
    torch.testing.assert_close(nothing.embeds, embeds)
    torch.testing.assert_close(nothing.pooled, pooled)
    assert (embeds.count_nonzero() == 0) == zeros


def test_the_empty_prompt_is_remembered_where_text_encoders_are_gone(folder, tmp_path):
    module = PersonalizationModule(str(guided_by_words(folder, tmp_path)), adapter=LoRA(rank=1))
    module.class_word = "ball"
    base = module.load()
    with torch.no_grad():
        empty = condition_on(base, [""]).embeds
    base.release_text_encoders()
    read, times, told = base.read_text_encoders, [], []
    base.read_text_encoders = lambda: times.append(1) or read()
    base.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    generate(module, ["a sks ball"], [0], steps=1, resolution=SIDE)
    assert len(times) == 1 and torch.equal(base.remembered[""].embeds, empty)
    torch.testing.assert_close(told[0][:1], empty)


def test_the_export_gives_diffusers_the_same_picture(folder, theirs, tmp_path):
    base, adapter = trained(folder)
    (path,) = adapter.export(tmp_path)
    tensors = load_file(path)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"clip_l": (2, 24), "clip_g": (2, 40)}
    for key, encoder, tokenizer in (
        ("clip_l", theirs.text_encoder, theirs.tokenizer),
        ("clip_g", theirs.text_encoder_2, theirs.tokenizer_2),
    ):
        theirs.load_textual_inversion(tensors[key], token="<sks>", text_encoder=encoder, tokenizer=tokenizer)
    prompt, settings = "a photo of a <sks> ball", {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    with torch.no_grad():
        a = theirs(prompt, generator=torch.Generator().manual_seed(1), height=SIDE, width=SIDE, **settings).images
        words, nothing = condition_on(base, [prompt], adapter.tokens()), condition_on(base, [""]).nothing()
        pipe = base.pipeline(theirs.vae)
        pipe.scheduler = copy.deepcopy(theirs.scheduler)
        b = pipe(
            prompt_embeds=words.embeds,
            pooled_prompt_embeds=words.pooled,
            negative_prompt_embeds=nothing.embeds,
            negative_pooled_prompt_embeds=nothing.pooled,
            generator=torch.Generator().manual_seed(1),
            height=SIDE,
            width=SIDE,
            **settings,
        ).images
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_an_export_loads_back(folder, tmp_path):
    base, adapter = trained(folder)
    adapter.token = "<my-ball>"
    adapter.export(tmp_path)
    other = TokenEmbedding()
    other.load_export(tmp_path)
    other.attach(base)
    assert other.token == "<my-ball>" and other.origin["base"] == str(folder)
    assert torch.equal(other.theta, adapter.theta)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_trains_and_draws(folder, photo_folder, precision):
    module = PersonalizationModule(
        base=str(folder),
        precision=precision,
        adapter=TokenEmbedding(init="ball"),
        estimator=RandomGradientEstimator(n=2, mu=1e-3),
        subspace=SubspaceGradient(tau=2, nu=1e-3),
    )
    trainer = Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.fit(module, SubjectData(photo_folder, class_word="ball", resolution=SIDE))
    start = TokenEmbedding(init="ball")
    start.attach(module.base)
    moved = (module.adapter.theta - start.theta).abs()
    assert (moved[:, : WIDTHS[0]] > 0).all() and (moved[:, WIDTHS[0] :] > 0).all()
    (picture,) = generate(module, ["a <sks> ball"], [0], steps=2, resolution=SIDE)
    assert picture.size == (SIDE, SIDE)


def test_a_picture_is_drawn_as_large_as_it_was_trained(folder):
    base, told = load_base(folder), []
    base.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    generate(base, ["a ball"], [0], steps=1, resolution=48)
    assert told and all(sizes.tolist() == [[48, 48, 0, 0, 48, 48]] * len(sizes) for sizes in told)


def test_the_gradient_of_a_step_is_the_exact_one_along_its_directions(folder):
    """A two-sided difference with a small mu, in float64, against backpropagation through both encoders."""
    base, adapter = trained(folder)
    base.unet.double()
    for encoder in base.text_encoders:
        encoder.double()
    base.dtype = torch.float64
    latents, timestep = torch.randn(1, 4, 16, 16, dtype=torch.float64), torch.tensor([300])

    def loss(theta):
        told = condition_on(base, ["a <sks> ball"], adapter.tokens(theta[None]))
        return predict_noise(base.unet, latents, timestep, told).pow(2).mean()

    theta = adapter.theta.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta)
    assert (gradient[:, : WIDTHS[0]] != 0).any() and (gradient[:, WIDTHS[0] :] != 0).any()
    direction = torch.randn_like(theta)
    with torch.no_grad():
        slope = (loss(theta + 1e-5 * direction) - loss(theta - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-10)


def test_its_autoencoder_stays_in_fp32_where_fp16_overflows(folder, tmp_path):
    assert vae_dtype(folder, torch.float16) == torch.float32
    assert vae_dtype(folder, torch.bfloat16) == torch.bfloat16
    assert vae_dtype(TINY_FOLDER, torch.float16) == torch.float16
    found = open_base(folder, "fp16")
    with found.borrowed_vae() as vae:
        assert vae.dtype == torch.float32 and vae.use_tiling and vae.tile_sample_min_size == 512


def test_forward_gradients_reach_the_pooled_text(folder):
    """There tangents enter with the timestep's embedding, ahead of every layer."""
    module = PersonalizationModule(
        str(folder), adapter=TokenEmbedding(init="ball"), estimator=ForwardGradientEstimator(n=3, seed=0)
    )
    module.class_word = "ball"
    base = module.load()
    batch = made_up_batch(base, 32) | {"mean": torch.randn(1, 4, 16, 16), "std": torch.zeros(1, 4, 16, 16)}
    draw, theta = module.draw(batch), module.adapter.theta
    weights, _ = module.estimator.weigh(lambda members: module.losses(members, draw), 1)
    (gradient,) = torch.autograd.grad(module.losses(HERE, draw).sum(), theta)
    exact = torch.stack([(direction(theta, 0, 0, i) * gradient).sum() for i in range(3)])
    torch.testing.assert_close(3 * weights, exact, rtol=1e-3, atol=1e-6)
