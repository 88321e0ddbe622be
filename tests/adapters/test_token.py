"""The token: its start, its file, and that no other token changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mep_lightning.adapters import TokenEmbedding, token
from mep_lightning.errors import UserError
from mep_lightning.tiny import BASE


def attached(base, **kwargs):
    adapter = TokenEmbedding(**kwargs)
    adapter.attach(base, "ball")
    return adapter


def test_it_starts_as_a_copy_of_its_initialiser(tiny_base):
    table = tiny_base.text_encoders[0].get_input_embeddings().weight
    ball = tiny_base.tokenizers[0]("ball").input_ids[1]
    for adapter in (attached(tiny_base), attached(tiny_base, init="ball"), attached(tiny_base, vectors=3)):
        assert torch.equal(adapter.theta, table[ball].repeat(adapter.vectors, 1))
    assert adapter.theta.requires_grad and not table.requires_grad


@pytest.mark.parametrize("vectors", [1, 2])
def test_the_export_gives_diffusers_the_same_picture(tiny_base, tmp_path, vectors):
    from diffusers import StableDiffusionPipeline

    from mep_lightning.bases import encode_prompts

    adapter = attached(tiny_base, vectors=vectors)
    with torch.no_grad():
        adapter.theta.add_(0.05 * torch.randn(vectors, 128, generator=torch.Generator().manual_seed(0)))
    (path,) = adapter.export(tmp_path)
    assert path.name == "learned_embeds.safetensors"
    assert {k: tuple(v.shape) for k, v in load_file(path).items()} == {"<sks>": (vectors, 128)}

    theirs = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    table = theirs.text_encoder.get_input_embeddings().weight.clone()
    theirs.load_textual_inversion(str(path))
    assert torch.equal(theirs.text_encoder.get_input_embeddings().weight[: len(table)], table)

    prompt = "a photo of a <sks> ball on grass"
    settings = dict(num_inference_steps=3, guidance_scale=3.0, output_type="pt")
    theirs.set_progress_bar_config(disable=True)
    a = theirs(prompt, generator=torch.Generator().manual_seed(1), **settings).images
    with torch.no_grad(), tiny_base.borrowed_vae() as vae:
        embeds = encode_prompts(tiny_base, [prompt], adapter.tokens())
        empty = encode_prompts(tiny_base, [""])
        pipe = tiny_base.pipeline(vae)
        b = pipe(
            prompt_embeds=embeds, negative_prompt_embeds=empty, generator=torch.Generator().manual_seed(1), **settings
        ).images
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_an_export_loads_back(tiny_base, tmp_path):
    adapter = attached(tiny_base, token="<my-ball>", vectors=2)
    adapter.export(tmp_path)
    other = TokenEmbedding()
    other.load_export(tmp_path)
    other.attach(tiny_base, "ball")
    assert other.token == "<my-ball>" and torch.equal(other.theta, adapter.theta)


def test_an_export_says_what_it_belongs_to(tiny_base, tmp_path):
    attached(tiny_base).export(tmp_path)
    adapter = TokenEmbedding()
    adapter.load_export(tmp_path)
    assert adapter.origin == {"base": "tiny", "precision": tiny_base.precision, "class_word": "ball"}
    adapter.attach(replace(tiny_base, name=str(BASE), precision="bf16"))
    assert adapter.origin == {"base": str(BASE), "precision": "bf16"}
    save_file({"<sks>": torch.zeros(1, 128)}, tmp_path / "learned_embeds.safetensors", {"format": "pt"})
    adapter.load_export(tmp_path)
    assert adapter.origin == {}


def test_an_export_without_a_token_is_refused_and_changes_nothing(tmp_path):
    adapter = TokenEmbedding("<mine>")
    for tensors in ({}, {"<a>": torch.zeros(1, 4), "<b>": torch.zeros(1, 4)}, {"<a>": torch.zeros(4)}):
        save_file(tensors, tmp_path / "learned_embeds.safetensors")
        with pytest.raises(UserError, match=f"holds {len(tensors)} tensors: a token's file has one"):
            adapter.load_export(tmp_path)
    assert adapter.token == "<mine>" and adapter.theta is None


def test_values_that_are_not_finite_are_not_exported(tiny_base, tmp_path):
    adapter = attached(tiny_base)
    adapter.theta.data[0, 3] = float("nan")
    with pytest.raises(UserError, match="<sks> is no longer finite, so it is not exported"):
        adapter.export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_in_a_local_folder_is_kept_as_an_absolute_path(tiny_base, monkeypatch):
    monkeypatch.chdir(BASE.parent)
    adapter = TokenEmbedding()
    adapter.attach(replace(tiny_base, name="base", folder=Path("base")), "ball")
    assert adapter.origin["base"] == str(BASE)


def test_it_stays_fp32(tiny_base):
    adapter = attached(tiny_base)
    adapter.theta.data.add_(1e-6)
    before = adapter.theta.detach().clone()
    for cast in (adapter.to(torch.bfloat16), adapter.half(), adapter.bfloat16()):
        assert cast.theta.dtype == torch.float32 and torch.equal(cast.theta, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: TokenEmbedding("two words"), "without spaces"),
        (lambda base: TokenEmbedding(vectors=0), "at least one"),
        (lambda base: attached(base, init="xylophone"), "init, 'xylophone', is"),
        (lambda base: attached(base, token="ball"), "already a word"),
        (lambda base: attached(base, token="Ball"), "already a word"),
        (
            lambda base: TokenEmbedding().attach(base, "xylophone"),
            r"init ball \(it also knows cube, .*, cat\)",
        ),
    ],
)
def test_bad_settings_are_one_sentence(tiny_base, make, message):
    with pytest.raises(UserError, match=message):
        make(tiny_base)


def test_the_word_that_is_suggested_is_one_token(tiny_base):
    other = replace(tiny_base, info=replace(tiny_base.info, family="sd1"))  # its vocabulary lacks "toy" all the same
    with pytest.raises(UserError, match="give an init that is one, such as --model.adapter.init_args.init style$"):
        attached(other, init="xylophone")


def test_damaged_or_foreign_exports_are_refused(tiny_base, tmp_path):
    with pytest.raises(UserError, match="holds no learned_embeds"):
        TokenEmbedding().load_export(tmp_path)
    (tmp_path / "learned_embeds.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is damaged"):
        TokenEmbedding().load_export(tmp_path)
    save_file({"<sks>": torch.zeros(1, 768)}, tmp_path / "learned_embeds.safetensors")
    adapter = TokenEmbedding()
    adapter.load_export(tmp_path)
    with pytest.raises(UserError, match="768 dimensions, the base tiny takes 128"):
        adapter.attach(tiny_base)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"<sks>": torch.zeros(0, 128)}, None, "holds no vectors"),
        ({"<sks>": torch.full((1, 128), float("nan"))}, None, "holds values that are not finite"),
        ({"two words": torch.zeros(1, 128)}, None, "names its token 'two words': it must be one word"),
        ({" ": torch.zeros(1, 128)}, None, "it must be one word"),
        ({"x" * 1000: torch.zeros(1, 128)}, None, "it must be one word"),
        ({"a": torch.zeros(1, 64), "b": torch.zeros(1, 64)}, None, "holds 2 tensors"),
        ({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(2, 64)}, {"mep.token": "<sks>"}, "holds 2 tensors"),
        ({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 64)}, {"mep.token": ""}, "it must be one word"),
        ({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 64)}, {"mep.token": "<a>"}, "the base tiny takes 128"),
    ],
)
def test_hostile_exports_are_one_sentence(tiny_base, tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "learned_embeds.safetensors", metadata)

    def load():
        adapter = TokenEmbedding()
        adapter.load_export(tmp_path)
        adapter.attach(tiny_base)

    with pytest.raises(UserError, match=message):
        load()


def test_an_export_is_whole_or_not_there_and_anyone_may_read_it(tiny_base, tmp_path, monkeypatch):
    adapter = attached(tiny_base)
    (path,) = adapter.export(tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    before = path.read_bytes()

    def disk_full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(token, "save_file", disk_full)
    with pytest.raises(OSError, match="disk full"):
        adapter.export(tmp_path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path, plain]
