"""The recipe's loop: a stopped run carries on, and the average is what is published."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from mep_lightning.tiny import BASE, CLIP, DINO, WEIGHTS
from mep_lightning.tiny.train.__main__ import main
from mep_lightning.tiny.train.diffusion import CachedScenes, train_diffusion
from mep_lightning.tiny.train.encoders import train_clip, train_dino
from mep_lightning.tiny.train.loop import Ema, fit, learning_rate
from mep_lightning.tiny.train.publish import publish_base, publish_encoders
from mep_lightning.tiny.train.text import write_tokenizer
from mep_lightning.tiny.train.vae import train_vae


def train(tmp_path, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    ema = Ema(model, 0.9)

    def loss_fn(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x).float() - x.sum(1, keepdim=True)).pow(2).mean(), {}

    fit("toy", model, loss_fn, **({"steps": 12} | options), lr=0.05, out=tmp_path, ema=ema, save_every=5)
    return model, ema


def test_a_stopped_run_carries_on_as_if_it_had_not_stopped(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    whole, average = train(tmp_path / "a")
    train(tmp_path / "b", stop_at=7)
    resumed, resumed_average = train(tmp_path / "b")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in average.values.items():
        assert torch.equal(value, resumed_average.values[name])


def test_the_average_is_copied_into_the_module(tmp_path):
    model, ema = train(tmp_path)
    assert not torch.equal(model.weight, ema.values["weight"])
    ema.copy_to(model)
    assert torch.equal(model.weight, ema.values["weight"])
    assert "ema.weight" in load_file(tmp_path / "toy.safetensors")


def test_the_tokenizer_comes_out_the_same_and_is_the_one_that_ships(tmp_path):
    ids = write_tokenizer(tmp_path).get_vocab()
    assert ids == write_tokenizer(tmp_path / "again").get_vocab()
    assert ids == CLIPTokenizer.from_pretrained(BASE / "tokenizer").get_vocab()
    assert ids == CLIPTokenizer.from_pretrained(CLIP).get_vocab()


def test_the_learning_rate_warms_up_and_comes_down():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == rates[100] == 1.0 and 0.02 <= rates[-1] < 0.0201


def every_stage(out, device, steps):
    """Trains all networks for a few steps, or on to so many; the tokenizer, and the networks by name."""
    tokenizer = write_tokenizer(out / "tokenizer")
    vae = train_vae(out, steps=steps, batch=2, device=device)
    data = CachedScenes(vae, out, count=500, named=500)
    unet, text_encoder = train_diffusion(data, 1.0, tokenizer, out, steps=steps, batch=2, device=device)
    clip = train_clip(tokenizer, out, steps=steps, batch=4, device=device)
    dino = train_dino(out, steps=steps, batch=4, device=device)
    return tokenizer, {"vae": vae, "unet": unet, "text_encoder": text_encoder, "clip": clip, "dino": dino}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_stage_trains_where_it_is_told_to_and_carries_on_from_another_devices_checkpoint(tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    every_stage(tmp_path, "cpu", steps=1)
    before = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    tokenizer, networks = every_stage(tmp_path, device, steps=2)
    for network in networks.values():
        assert {parameter.device.type for parameter in network.parameters()} == {device}
    assert set(before) == {f"{name}.safetensors" for name in ("vae", "latents", "diffusion", "clip", "dino")}
    for name in set(before) - {"latents.safetensors"}:
        after = load_file(tmp_path / name)
        assert after.keys() == before[name].keys()
        assert all(value.isfinite().all() for value in after.values())
        assert any(not torch.equal(value, before[name][key]) for key, value in after.items() if key.startswith("ema."))

    publish_encoders(networks["clip"], networks["dino"], tokenizer, tmp_path / "weights")
    publish_base(networks["vae"], networks["unet"], networks["text_encoder"], tmp_path / "weights" / "base")
    for part in (CLIP, DINO, BASE / "scheduler"):
        for shipped in part.glob("*r_config.json"):
            written = tmp_path / "weights" / shipped.relative_to(WEIGHTS)
            assert json.loads(written.read_text()) == json.loads(shipped.read_text()), shipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / "out"), "--device", "cuda"])
    with pytest.raises(SystemExit):
        main()
    assert "--device cuda: no CUDA device is here; use cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
