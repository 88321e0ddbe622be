"""What a base is, told from its files before anything is loaded, and how a hub's are fetched."""

import json
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from mep_lightning.bases import identify, load_base, open_base
from mep_lightning.errors import UserError
from mep_lightning.tiny import BASE
from tests.folders import changed, save_sharded, without


def test_identify_reads_families_from_json(tmp_path):
    assert identify("tiny") == identify(BASE)
    assert identify("tiny").family == "tiny" and identify("tiny").resolution == 64

    def variant(width, sample, prediction, name="StableDiffusionPipeline"):
        folder = tmp_path / f"{width}{prediction}"
        shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for path, changes in (
            ("unet/config.json", {"cross_attention_dim": width, "sample_size": sample}),
            ("vae/config.json", {"block_out_channels": [1, 2, 3, 4]}),
            ("scheduler/scheduler_config.json", {"prediction_type": prediction}),
            ("model_index.json", {"_class_name": name}),
        ):
            content = json.loads((folder / path).read_text()) | changes
            (folder / path).write_text(json.dumps(content))
        if "XL" in name:
            for part in ("text_encoder", "tokenizer"):
                shutil.copytree(folder / part, folder / f"{part}_2")
        return identify(folder)

    assert variant(768, 64, "epsilon") == type(identify("tiny"))("sd1", 512, 8, "epsilon")
    assert variant(1024, 96, "v_prediction") == type(identify("tiny"))("sd2", 768, 8, "v_prediction")
    assert variant(2048, 128, "epsilon", "StableDiffusionXLPipeline").family == "sdxl"


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (SCHEDULER, {"prediction_type": "sample"}, r"neither noise nor v .prediction_type 'sample' in scheduler/sch"),
        (
            SCHEDULER,
            {"prediction_type": "flow_prediction"},
            "prediction_type 'flow_prediction' in scheduler/scheduler_",
        ),
        (SCHEDULER, {"prediction_type": None}, "prediction_type None in scheduler/scheduler_config.json"),
        (
            SCHEDULER,
            {"_class_name": "EDMDPMSolverMultistepScheduler"},
            "a noise schedule of its own .EDMDPMSolverMultistepScheduler in scheduler/scheduler_config.json.: use a",
        ),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "of its own .FlowMatchEulerDiscreteScheduler"),
        (UNET, {"class_embed_type": "projection"}, "class_embed_type 'projection' in unet/config.json.: use a text-to"),
        (UNET, {"num_class_embeds": 7}, "must be told more than a text .num_class_embeds 7 in unet/config.json"),
        (UNET, {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj' in unet/config.json"),
        (UNET, {"encoder_hid_dim": 7}, "encoder_hid_dim 7 in unet/config.json"),
        (UNET, {"addition_embed_type": "image"}, "addition_embed_type 'image' in unet/config.json"),
        (UNET, {"in_channels": 9}, "takes 9 channels, as inpainting models do: use a text-to-image one"),
        (UNET, {"in_channels": 8}, "takes 8 channels, as InstructPix2Pix models do"),
        (UNET, {"in_channels": 7}, "takes 7 channels, as upscalers do"),
        (UNET, {"in_channels": 6}, "takes 6 channels: use a text-to-image one"),
        (UNET, {"in_channels": 5}, "takes 5 channels, as depth models do"),
    ],
)
def test_a_base_of_another_kind_is_refused_before_anything_is_loaded(tmp_path, path, changes, message):
    folder = shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    changed(folder / path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        identify(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_a_scheduler_that_draws_from_the_same_noise_is_taken(tmp_path, kind):
    folder = shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    changed(folder / SCHEDULER, _class_name=kind)
    without(folder / SCHEDULER, "prediction_type")  # as SD1's repositories, which are older than the setting
    assert identify(folder) == identify("tiny")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/such/folder"])
def test_a_base_that_is_not_there(name):
    with pytest.raises(UserError, match="is no folder"):
        load_base(name)


def test_a_hub_id_without_a_network():
    with pytest.raises(UserError, match="neither a folder here nor to be had from the hub"):
        load_base("some-owner/some-model")


def cached_on_hub(cache, repository, folder, revision):
    """A folder as the hub's client keeps it, under a revision."""
    stored = cache / f"models--{repository.replace('/', '--')}"
    commit = "c" * 40
    shutil.copytree(folder, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / revision).write_text(commit)


def test_a_hub_id_may_be_pinned_to_a_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached_on_hub(tmp_path, "some-owner/some-model", BASE, "v2.0")
    for name in ("some-owner/some-model@v2.0", f"some-owner/some-model@{'c' * 40}"):
        assert (open_base(name).family, open_base(name).address) == ("tiny", name)
    for name in ("some-owner/some-model", "some-owner/some-model@v1.0"):
        with pytest.raises(UserError, match="neither a folder here nor to be had from the hub"):
            open_base(name)


def on_hub(monkeypatch, root, files):
    """A repository in the place of the hub; answers the list that fetched files are added to."""
    commit, fetched = root / "snapshots" / ("c" * 40), []

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
        assert revision in (None, commit.name)
        chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for path in chosen:
            (commit / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[path], commit / path)
            fetched.append(path)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def published(*names):
    """What a repository holds: the embedded base, its weights once under each of these names."""
    files = {path.relative_to(BASE).as_posix(): path for path in BASE.rglob("*.*")}
    weights = [path for path in files if path.endswith(".safetensors")]
    others = {path: file for path, file in files.items() if path not in weights}
    return others | {path.replace(".safetensors", name): files[path] for path in weights for name in names}


def test_plain_weights_are_fetched_and_no_other_variant(tmp_path, monkeypatch):
    names = (".safetensors", ".fp16.safetensors", ".fp16-00001-of-00001.safetensors", ".non_ema.safetensors", ".bin")
    fetched = on_hub(monkeypatch, tmp_path, published(*names))
    assert open_base("some-owner/some-model").family == "tiny"
    assert sorted(fetched) == sorted(published(".safetensors"))
    assert len([path for path in fetched if path.endswith(".safetensors")]) == 3


def test_fp16_is_fetched_of_the_parts_that_have_nothing_else(tmp_path, monkeypatch, tiny_base):
    files = published(".fp16.safetensors", ".fp16.bin", ".non_ema.fp16.safetensors")
    files["vae/diffusion_pytorch_model.safetensors"] = BASE / "vae/diffusion_pytorch_model.safetensors"
    fetched = on_hub(monkeypatch, tmp_path, files)
    identify("some-owner/some-model")
    assert not [path for path in fetched if "fp16" in path]  # nor any other weights
    base = load_base("some-owner/some-model")
    assert sorted(path for path in fetched if path.endswith((".safetensors", ".bin"))) == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    for theirs, ours in zip(tiny_base.modules(), base.modules(), strict=True):
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_shards_in_fp16_are_fetched_with_their_index(tmp_path, monkeypatch, tiny_base):
    files = published(".safetensors")
    whole = files.pop("unet/diffusion_pytorch_model.safetensors")
    save_sharded(tmp_path / "unet", whole.parent)
    files |= {f"unet/{path.name}": path for path in (tmp_path / "unet").iterdir()}
    on_hub(monkeypatch, tmp_path, files)
    ours = load_base("some-owner/some-model", vae=False).unet.state_dict()
    assert all(torch.equal(ours[key], value.half().float()) for key, value in tiny_base.unet.state_dict().items())


def test_a_repository_without_safetensors_is_told_apart_from_one_that_is_not_there(tmp_path, monkeypatch):
    on_hub(monkeypatch, tmp_path, published(".bin", ".non_ema.safetensors"))
    message = "'some-owner/some-model' has no safetensors of its unet, vae, text_encoder in .*: choose a repository or"
    with pytest.raises(UserError, match=message):
        open_base("some-owner/some-model")
