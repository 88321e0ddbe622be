"""Streamed weights: the same bits through a small arena, whatever the order of the layers."""

import errno
import gc
import weakref
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch import nn

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.advice import refuse_streaming_backwards
from mep_lightning.bases import frugal, load_base, streaming
from mep_lightning.bases.streaming import Stream, streamed_bytes
from mep_lightning.bases.walk import predict_noise
from mep_lightning.cli import sentence_about
from mep_lightning.errors import UserError
from mep_lightning.estimators import RandomGradientEstimator
from mep_lightning.kernels.tf32 import whole_products
from mep_lightning.quantization import why_not_int4

CPU = torch.device("cpu")
QUANTIZED = ["int8", *([] if why_not_int4() else ["int4"])]


class Poisoned(Stream):
    """Overwrites a layer's stretch as soon as it has computed, and counts the layers that were not expected."""

    surprises = 0

    def _after(self, layer, *args):
        visit = self._coming()
        self.arena[visit.start : visit.stop] = 0xFF
        super()._after(layer, *args)

    def _surprise(self, key):
        self.surprises += 1
        return super()._surprise(key)


class Gone(Poisoned):
    """After a layer has computed its tensors hold nothing, as if the device could not read the host's memory."""

    def _after(self, layer, *args):
        super()._after(layer, *args)
        layer.put(torch.full_like(layer.host, 0xFF))


def weights(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_streamed_unet_and_text_encoder_compute_the_same_bits(precision):
    plain, base = load_base("tiny", precision, vae=False), load_base("tiny", precision, vae=False)
    streams = [Poisoned(part, CPU) for part in (base.unet, base.text_encoders[0])]
    ids = torch.randint(0, 100, (3, 32))
    for step in range(3):
        x, t = torch.randn(3, 4, 16, 16), torch.tensor([step])
        with torch.no_grad():
            outputs = []
            for one in (plain, base):
                embeds = one.text_encoders[0](ids).last_hidden_state
                outputs.append(one.unet(x, t, embeds).sample)
        assert torch.equal(*outputs)
    assert len(streams[0].arena) < 0.35 * weights(plain.unet)
    for stream in streams:  # the first pass, and the beginning of the second
        assert stream.surprises == len(stream.layers) + 1
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(base.unet.state_dict()[name], value)


class Choosing(nn.Module):
    """Layers called in an order that changes, one of them never."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])
        self.table = nn.Embedding(10, 8)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, ids, order):
        x = self.table(ids) + self.shift
        for i in order:
            x = self.steps[i](x)
        return x


@torch.no_grad()
def test_any_order_is_right():
    torch.manual_seed(0)
    module = Choosing()
    orders = [[0, 1, 2], [0, 1, 2], [0, 2, 1], [2, 0, 3], [0, 1, 2, 3], [3, 3, 3], [1], [0, 1, 2, 3], [0, 1, 2, 3]]
    ids = torch.arange(10)
    expected = [module(ids, order) for order in orders]
    stream = Poisoned(module, CPU)
    assert len(stream.layers) == 5  # neither the table nor what is owned beside layers
    for order, right in zip(orders, expected, strict=True):
        assert torch.equal(module(ids, order), right)
    before = stream.surprises
    for _ in range(3):
        module(ids, [0, 1, 2, 3])
    assert stream.surprises == before  # learned by now


def test_a_closed_stream_leaves_the_module_as_it_was_and_nothing_behind():
    module = Choosing().requires_grad_(False)
    ids, expected = torch.arange(10), None
    expected = module(ids, [0, 1])
    stream = Stream(module, CPU)
    assert torch.equal(module(ids, [0, 1]), expected)
    stream.close()
    assert stream.arena.numel() == 0
    assert torch.equal(module(ids, [0, 1]), expected)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    gone, _ = weakref.ref(stream), gc.disable()
    try:
        del stream
        assert gone() is None  # without the cyclic collector
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["fp32", *QUANTIZED])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_calls_for_the_weights_again_and_gives_the_same_bits(precision, checkpointing):
    plain, base = load_base("tiny", precision, vae=False), load_base("tiny", precision, vae=False)
    stream = Gone(base.unet, CPU)
    for step in range(3):
        x, t = torch.randn(1, 4, 16, 16), torch.tensor([step])
        embeds = torch.randn(1, 32, 128, requires_grad=True)
        grads = [
            torch.autograd.grad(predict_noise(unet, x, t, embeds, checkpointing=checkpointing).square().sum(), embeds)[
                0
            ]
            for unet in (plain.unet, base.unet)
        ]
        assert torch.equal(*grads)
        if step == 1:
            before = stream.surprises
    assert stream.surprises == before  # the order is learned, backwards too
    assert len(stream.arena) < 0.35 * weights(plain.unet)
    assert streamed_bytes(plain.unet) < 0.4 * weights(plain.unet)  # packed weights visit as others do


@pytest.mark.parametrize("precision", QUANTIZED)
def test_autograd_keeps_none_of_the_arena(precision):
    base = load_base("tiny", precision, vae=False)
    stream, kept = Stream(base.unet, CPU), []
    embeds = torch.randn(1, 32, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        predict_noise(base.unet, torch.randn(1, 4, 16, 16), torch.tensor([5]), embeds)
    arena = stream.arena.untyped_storage().data_ptr()
    assert kept and not any(x.untyped_storage().data_ptr() == arena for x in kept)


def test_channels_last_weights_keep_their_format():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 5, 5)
    module = nn.Sequential(conv).requires_grad_(False)
    expected = module(x)
    Stream(module, CPU)
    assert torch.equal(module(x), expected)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of mapped files")
def test_on_a_cpu_weights_are_mapped_from_a_file_that_is_gone_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CACHE", tmp_path / "cache")
    plain, mapped = load_base("tiny", "int8"), load_base("tiny", "int8", offload="stream")
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3]), torch.randn(2, 32, 128)
    with torch.no_grad():
        assert torch.equal(plain.unet(*inputs).sample, mapped.unet(*inputs).sample)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/cache" in line]
    ranges = [tuple(int(end, 16) for end in words[0].split("-")) for words in maps]
    for part in mapped.modules():
        for tensor in (*part.parameters(), *part.buffers()):
            assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)
    assert not list((tmp_path / "cache").iterdir())


def test_no_file_has_a_name_while_weights_are_copied(tmp_path, monkeypatch):
    """A kill would leave it for good."""
    put, seen = streaming.Layer.put, []

    def looking(layer, memory):
        seen.append(list((tmp_path / "cache").iterdir()))
        put(layer, memory)

    monkeypatch.setattr(streaming, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(streaming.Layer, "put", looking)
    streaming.map_to_disk(Choosing())
    assert seen and not any(seen)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_does_not_hold_the_weights_is_told_with_its_folder(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(streaming, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(streaming.os, "posix_fallocate", refuse, raising=False)
    with pytest.raises((UserError, OSError)) as told:
        load_base("tiny", "int8", offload="stream")
    sentence, _ = sentence_about(told.value, "fit")
    assert sentence.startswith(f"{tmp_path / 'cache'}")
    assert number == errno.EIO or ("the disk is full" in sentence and "set XDG_CACHE_HOME" in sentence)
    assert not list((tmp_path / "cache").iterdir())


def test_a_run_learns_the_same_bits_from_mapped_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CACHE", tmp_path)
    learned = []
    for offload in ("none", "stream"):
        module = PersonalizationModule("tiny", "int8", estimator=RandomGradientEstimator(2, 1e-3), offload=offload)
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        Trainer(max_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(module, SubjectData(seed=0))
        learned.append(module.adapter.theta)
    assert torch.equal(*learned)


def test_a_pipeline_computes_where_its_base_does():
    base = load_base("tiny", vae=False)
    base.device = torch.device("meta")
    assert base.pipeline(None)._execution_device == torch.device("meta")


def test_a_backward_pass_that_would_save_nothing_cannot_stream_to_a_gpu():
    gpu = torch.device("cuda:0")
    for settings in ({}, {"checkpointing": True}, {"precision": "int8"}):
        module = PersonalizationModule("tiny", offload="stream", **settings)
        refuse_streaming_backwards(module, CPU)
        with pytest.raises(UserError, match="set model.checkpointing true and model.precision int8, or use zoodip"):
            refuse_streaming_backwards(module, gpu)
    frugal = PersonalizationModule("tiny", "int8", offload="stream", checkpointing=True)
    refuse_streaming_backwards(frugal, gpu)
    with pytest.raises(UserError, match="offload 'disk' is unknown: choose one of none, stream"):
        load_base("tiny", offload="disk")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", QUANTIZED)
def test_cuda_computes_the_same_bits_from_pinned_memory(precision):
    device = torch.device("cuda")
    plain, waiting = (  # packed by the CPU, and laid out as on a GPU
        load_base("tiny", precision, vae=False).unet.to(memory_format=torch.contiguous_format) for _ in range(2)
    )
    plain.to(device)
    stream = Poisoned(waiting, device)
    assert all(layer.host.is_pinned() for layer in stream.layers)
    for _ in range(20):
        inputs = torch.randn(9, 4, 16, 16, device=device), torch.tensor([7], device=device)
        embeds = torch.randn(9, 32, 128, device=device)
        with torch.no_grad():
            assert torch.equal(plain(*inputs, embeds).sample, waiting(*inputs, embeds).sample)
    embeds = torch.randn(1, 32, 128, device=device, requires_grad=True)
    for _ in range(20):
        latents, times = torch.randn(1, 4, 16, 16, device=device), torch.tensor([7], device=device)
        with whole_products():  # TF32 may round one way of summing otherwise than another
            ours, theirs = (
                torch.autograd.grad(
                    predict_noise(unet, latents, times, embeds, checkpointing=True).square().sum(), embeds
                )[0]
                for unet in (waiting, plain)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_feed_forward_layer_in_blocks_comes_once_a_pass(monkeypatch):
    """Its parts are called once for every block of rows, and are fetched together."""
    plain, base = load_base("tiny", "int8", vae=False), load_base("tiny", "int8", vae=False)
    monkeypatch.setattr(frugal, "HIDDEN", 2000)
    stream = Poisoned(base.unet, CPU)
    fetched = []
    fetch = stream._fetch

    def counting(key):
        visit = fetch(key)
        fetched.extend([] if visit is None else [key[0].size])
        return visit

    monkeypatch.setattr(stream, "_fetch", counting)
    x, t, embeds = torch.randn(3, 4, 16, 16), torch.tensor([5]), torch.randn(3, 32, 128)
    for _ in range(3):
        before = len(fetched)
        assert torch.equal(base.unet(x, t, embeds).sample, plain.unet(x, t, embeds).sample)
    assert sum(fetched[before:]) == sum(layer.size for layer in stream.layers)
    assert stream.surprises == len(stream.layers) + 1
