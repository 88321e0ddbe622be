"""Bases in a single file: a folder's tensors, in as little memory, and one sentence where that cannot be."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.bases import condition_on, identify, load_base, open_base, predict_noise
from mep_lightning.bases.conversion import names
from mep_lightning.bases.families import describe
from mep_lightning.bases.load import build_text_encoders, build_unet
from mep_lightning.bases.single_file import open_file
from mep_lightning.bases.skeleton import ARCHITECTURES
from mep_lightning.commands.budget import recipe
from mep_lightning.errors import UserError
from mep_lightning.plan import plan
from tests import single_file
from tests.personalizing import trainer
from tests.single_file import CLIP, KINDS, OPEN_CLIP, UNET, VAE, XL_OPEN_CLIP

each_kind = pytest.mark.parametrize("kind", KINDS)
quiet = pytest.mark.filterwarnings("ignore:.*does not say what it predicts")


def file_of(root, kind):
    return root / f"{kind}.safetensors"


def changed(root, kind, tmp_path, change=lambda tensors: tensors, **metadata):
    """A copy of a file, other tensors or metadata in it, beside a vocabulary."""
    tmp_path.mkdir(exist_ok=True)
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(file_of(root, kind))), path, metadata=metadata or None)
    return path


@quiet
@each_kind
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_holds_what_the_folder_holds(single_files, kind, precision):
    folder, file = (load_base(single_files / name, precision) for name in (kind, f"{kind}.safetensors"))
    assert (folder.info, folder.scaling_factor) == (file.info, file.scaling_factor)
    assert folder.scheduler.config.prediction_type == file.scheduler.config.prediction_type
    for theirs, ours in zip(folder.modules(), file.modules(), strict=True):
        expected, found = theirs.state_dict(), ours.state_dict()
        assert list(expected) == list(found) and type(theirs) is type(ours)
        for name, value in expected.items():
            assert torch.equal(value, found[name]) and value.dtype == found[name].dtype, name
    prompts, latents = ["a photo of a red ball", "grass"], torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        theirs, ours = (
            predict_noise(base.unet, latents, torch.tensor([10, 900]), condition_on(base, prompts))
            for base in (folder, file)
        )
    assert torch.equal(theirs, ours)


@quiet
@each_kind
def test_prompts_are_told_to_its_encoders_as_to_the_folders(single_files, kind):
    folder, file = (load_base(single_files / name, vae=False) for name in (kind, f"{kind}.safetensors"))
    for theirs, ours in zip(folder.tokenizers, file.tokenizers, strict=True):
        assert (theirs.pad_token_id, theirs.model_max_length) == (ours.pad_token_id, ours.model_max_length)


@quiet
@each_kind
def test_what_was_freed_or_released_is_read_from_the_file_again(single_files, kind):
    base = load_base(file_of(single_files, kind))
    whole = {name: value.clone() for name, value in base.unet.state_dict().items()}
    vae = base.vae.state_dict()
    base.free([base.unet.mid_block])
    base.release_vae()
    base.release_text_encoders()
    with base.whole(), base.borrowed_text_encoders(), base.borrowed_vae() as again:
        assert all(torch.equal(whole[name], value) for name, value in base.unet.state_dict().items())
        assert all(torch.equal(vae[name], value) for name, value in again.state_dict().items())
        assert len(base.text_encoders) == (2 if kind == "sdxl" else 1)


def sparse(path, shapes):
    """A file of these tensors whose bytes were never written, and take no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(("kind", "known_as"), [("sd15", "v1"), ("sd21", "v2"), ("sdxl", "xl_base")])
def test_the_published_files_have_every_tensor_of_their_architecture(kind, known_as, tmp_path):
    """In full size: names and shapes, to which diffusers gives the same kind."""
    folder = ARCHITECTURES / kind
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    texts = dict(zip(("text_encoder", "text_encoder_2"), build_text_encoders(folder), strict=False))
    modules = {"unet": build_unet(folder), "vae": vae, **texts}
    held = single_file.original(kind, {part: module.state_dict() for part, module in modules.items()}, 2)
    assert infer_diffusers_model_type(held) == known_as
    path = sparse(tmp_path / "published.safetensors", {name: value.shape for name, value in held.items()})
    assert identify(path) == describe(folder, kind)
    for part, module in modules.items():
        found = {name.removeprefix("text_model."): one for name, one in names(open_file(path), module, part).items()}
        for name, value in module.state_dict().items():
            assert found[name.removeprefix("text_model.")].shape == value.shape, name


def test_a_published_file_is_planned_for_without_its_weights(tmp_path):
    path = sparse(tmp_path / "sd21.safetensors", sd2_shapes())
    (tmp_path / "sd21.yaml").write_text("model: {params: {parameterization: eps}}")
    recipes = {"zoodip": recipe("zoodip")}
    rows = {base: plan(recipes, base, device="cpu", precisions=["int8"])[0] for base in (str(path), "sd21")}
    assert (rows[str(path)].resolution, rows["sd21"].resolution) == (512, 768)
    same = plan(recipes, "sd21", resolution=512, device="cpu", precisions=["int8"])[0]
    ours = rows[str(path)].phases
    assert all(ours[name] == same.phases[name] for name in ("encode", "load", "step"))
    assert ours["decode"].activations < same.phases["decode"].activations / 2  # pictures are 512 px, and 768


def sd2_shapes():
    """What is asked of a header before weights are."""
    return {
        UNET + "input_blocks.0.0.weight": (320, 4, 3, 3),
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        VAE + "quant_conv.weight": (8, 8, 1, 1),
        OPEN_CLIP + "ln_final.weight": (1024,),
    }


def test_what_sd2_predicts_is_told_beside_in_the_file_or_by_diffusers_rule(single_files, tmp_path):
    path = changed(single_files, "sd21", tmp_path)
    assert (identify(path).prediction, identify(path).resolution) == ("v_prediction", 32)
    with pytest.warns(UserWarning, match="does not say what it predicts, and is taken for v_prediction"):
        load_base(path)
    changed(single_files, "sd21", tmp_path, **{"modelspec.prediction_type": "epsilon"})
    assert (identify(path).prediction, identify(path).resolution) == ("epsilon", 512)
    changed(single_files, "sd21", tmp_path, lambda tensors: tensors | {"global_step": torch.tensor(875000)})
    assert identify(path).prediction == "epsilon"
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert identify(path).prediction == "v_prediction"
    path.with_suffix(".yaml").write_text("model: {params: {linear_start: 0.00085}}")  # as Stability's for SD2 base
    assert identify(path).prediction == "epsilon"
    base = load_base(path)
    assert base.scheduler.config.prediction_type == "epsilon"
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: x0}}")
    with pytest.raises(UserError, match="model.yaml does not say .* set model.params.parameterization to eps or v"):
        identify(path)
    for other in ("notes: nothing of ours", "model: {params: {denoiser_config: {}}}", "model: {base: tiny}"):
        path.with_suffix(".yaml").write_text(other)
        assert identify(path).prediction == "epsilon"  # as `global_step` says
    path.with_suffix(".yaml").write_text("model: [")
    with pytest.raises(UserError, match="model.yaml does not say"):
        identify(path)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_marks_of_a_base_that_predicts_v(single_files, tmp_path, kind):
    marks = {"v_pred": torch.ones(()), "ztsnr": torch.ones(())}
    base = load_base(changed(single_files, kind, tmp_path, lambda tensors: tensors | marks), vae=False)
    assert base.info.prediction == base.scheduler.config.prediction_type == "v_prediction"
    assert base.scheduler.alphas_cumprod[-1] == 0


def test_broken_position_ids_are_made_anew(single_files, tmp_path):
    broken = {f"{CLIP}text_model.embeddings.position_ids": torch.arange(32.0)[None] - 0.1}
    base = load_base(changed(single_files, "sd15", tmp_path, lambda tensors: tensors | broken), vae=False)
    assert base.text_encoders[0].embeddings.position_ids.equal(torch.arange(32)[None])


def test_half_precision_and_averaged_weights_in_a_file(single_files, tmp_path):
    """Averages of the U-Net's weights are not taken, as by default in diffusers."""

    def change(tensors):
        averages = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": 0 * v for k, v in tensors.items()}
        return {name: value.half() for name, value in (tensors | averages).items()}

    base = load_base(changed(single_files, "sd15", tmp_path, change), vae=False)
    expected = load_base(single_files / "sd15", vae=False).unet.state_dict()
    assert all(torch.equal(value.half().float(), base.unet.state_dict()[name]) for name, value in expected.items())


def test_an_int8_base_never_exists_in_floats_and_its_file_is_not_mapped(single_files):
    """Peak memory of loading, in a process of its own."""
    script = f"""
import json
from mep_lightning.bases import families, load_base
from mep_lightning.callbacks.meter import _Process
from pathlib import Path
families.ARCHITECTURES = Path({str(single_files / "architectures")!r})
load_base({str(file_of(single_files, "sdxl"))!r}, "int8")  # whatever is imported or allocated once
mark = _Process()
mark.take()
before = mark.take()
base = load_base({str(file_of(single_files, "sd15"))!r}, "int8")
print(json.dumps([mark.take() - before, "sd15.safetensors" in open("/proc/self/maps").read()]))
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or what is free would count as held
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    rise, mapped = json.loads(done.stdout.splitlines()[-1])
    size = file_of(single_files, "sd15").stat().st_size
    assert not mapped
    assert rise < 0.8 * size, f"{rise / size:.2f} of the file"


def test_an_export_says_which_file_it_belongs_to(single_files, photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(single_files)
    module = PersonalizationModule("sd15.safetensors", adapter=TokenEmbedding(init="ball"), lr=1e-3)
    trainer(1, tmp_path).fit(module, SubjectData(photo_folder, class_word="ball", resolution=32))
    module.adapter.export(tmp_path)
    again = TokenEmbedding()
    again.load_export(tmp_path)
    assert again.origin["base"] == str(file_of(single_files, "sd15"))


def whole(tensors):
    return {name: value.contiguous() for name, value in tensors.items()}


def test_a_file_that_is_gone_by_then_is_named(single_files, tmp_path):
    path = changed(single_files, "sdxl", tmp_path)
    base = load_base(path, vae=False)
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read"), base.borrowed_vae():
        pass


def only(*names):
    return lambda tensors: {name: torch.zeros(2, 2) for name in names}


def without(prefix):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(prefix)}


def with_channels(count):
    return lambda tensors: tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, count, 3, 3)}


def refiner(tensors):
    return {re.sub(r"^conditioner\.embedders\.[01]\.(transformer|model)", "conditioner.embedders.0.model", name): value
            for name, value in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sd15", with_channels(9), "takes 9 channels, as inpainting models do: use a text-to-image one"),
        ("sdxl", with_channels(8), "takes 8 channels, as InstructPix2Pix models do"),
        ("sdxl", refiner, "is SDXL's refiner, .* use the base"),
        ("sdxl", lambda t: t | {"edm_mean": torch.zeros(4)}, "noise schedule of its own"),
        ("sd15", only("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"), "is a LoRA, not a base"),
        ("sd15", only("unet.down_blocks.0.attentions.0.to_q.lora_A.weight"), "is a LoRA, not a base"),
        ("sd15", only("<sks>"), "is an embedding, not a base"),
        ("sd15", only("clip_l", "clip_g"), "is an embedding, not a base"),
        ("sd15", only("control_model.time_embed.0.weight"), "is a ControlNet"),
        (
            "sd15",
            only("double_blocks.0.img_attn.norm.key_norm.scale", *"abcd"),
            "is of no known family .it looks like flux",
        ),
        ("sd15", only(f"{UNET}joint_blocks.37.x_block.mlp.fc1.weight", *"abcd"), "no known family .it looks like sd35"),
        ("sd15", only(*"abcdef"), "is of no known family: use a Stable Diffusion 1, 2 or XL model"),
        ("sd15", only("down_blocks.0.resnets.0.conv1.weight"), "give the folder with model_index.json"),
        ("sd15", without(UNET), "is an autoencoder without its U-Net"),
        ("sd15", without(VAE), "lacks its vae: use a file with U-Net, autoencoder and text encoder"),
        ("sd15", without(CLIP), "lacks its text encoder"),
        ("sdxl", without(XL_OPEN_CLIP), "lacks its text_encoder_2"),
        (
            "sd15",
            without(f"{UNET}middle_block"),
            "model.safetensors lacks mid_block.* use one that nothing was cut from",
        ),
        ("sdxl", without(f"{UNET}label_emb"), "model.safetensors lacks 'label_emb.0.0.weight' of its unet"),
        ("sd15", without(f"{VAE}decoder.conv_in.weight"), "model.safetensors lacks decoder.conv_in.weight"),
        (
            "sd15",
            lambda t: t | {f"{UNET}out.2.weight": torch.zeros(4, 16, 3, 3)},
            r"conv_out.weight in .*model.safetensors is \[4, 16, 3, 3\], the model takes \[4, 8, 3, 3\]: it is no",
        ),
        (
            "sd15",
            lambda t: {k: v[:, :512] if k.endswith("attn2.to_k.weight") else v for k, v in t.items()},
            "its U-Net attends to 512 dimensions of text, and sd15's to 768",
        ),
    ],
)
def test_a_file_that_is_no_base_is_one_sentence(single_files, tmp_path, kind, change, message):
    path = changed(single_files, kind, tmp_path, lambda tensors: whole(change(tensors)))
    with pytest.raises(UserError, match=message) as caught:
        load_base(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 6, 500, -3])
def test_a_truncated_file_is_named(single_files, tmp_path, keep):
    path = changed(single_files, "sdxl", tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors cannot be read as safetensors .*: fetch it again"):
        identify(path)


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin", "CKPT"])
def test_a_pickle_is_refused_unread(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=f"model.{ending}' is pickled, .* convert it by diffusers'"):
        load_base(path)


@pytest.mark.parametrize("name", ["models/gone.safetensors", "gone.ckpt", "/no/such/model.safetensors"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="is no file: check the path"):
        identify(name)


def test_a_linked_file_keeps_what_lies_beside_the_link(single_files, tmp_path):
    """As in the hub's cache, whose files are links to nameless ones."""
    shutil.copytree(single_files / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "linked.safetensors"
    path.symlink_to(file_of(single_files, "sdxl"))
    found = open_base(path)
    assert found.address == str(path) and found.read_tokenizer("tokenizer_2", 32).pad_token == "!"
