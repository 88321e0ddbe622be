"""The recipe's loop: a stopped run carries on, and the average is what is published."""

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from mep_lightning.tiny import BASE, CLIP
from mep_lightning.tiny.train.loop import Ema, fit, learning_rate
from mep_lightning.tiny.train.text import write_tokenizer


def train(tmp_path, stop_at=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    ema = Ema(model, 0.9)

    def loss_fn(step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x).float() - x.sum(1, keepdim=True)).pow(2).mean(), {}

    fit("toy", model, loss_fn, steps=12, lr=0.05, out=tmp_path, ema=ema, save_every=5, stop_at=stop_at)
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
