"""A captured step is the step: the same token bit by bit, and nothing stale is replayed."""

import functools
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from lightning import Trainer

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import TokenEmbedding
from mep_lightning.advice import warn_of_idle_switches
from mep_lightning.bases import cuda_graph, predict_noise
from mep_lightning.bases.cuda_graph import CUDAGraphed
from mep_lightning.errors import UserError
from mep_lightning.estimators import ForwardGradientEstimator, RandomGradientEstimator, SubspaceGradient
from mep_lightning.tiny.subjects import subject


class Replayed(CUDAGraphed):
    """What a GPU does, on a CPU: arguments are copied to where they were captured, the answer appears where it was."""

    captures = 0

    def capture(self, *arguments):
        Replayed.captures += 1
        inputs = tuple(argument.detach().clone() for argument in arguments)
        output = self.function(*inputs).clone()
        return inputs, lambda: output.copy_(self.function(*inputs)), output


ESTIMATORS = {"finite": RandomGradientEstimator(n=2, mu=1e-3), "tangents": ForwardGradientEstimator(n=2)}


def token(tmp_path, graphed: bool, estimator: str, device: str = "cpu", steps: int = 6) -> torch.Tensor:
    for i, photo in enumerate(subject(0).photos()):
        photo.save(tmp_path / f"{i}.png")
    module = PersonalizationModule(
        precision="int8",
        adapter=TokenEmbedding(init="ball"),
        estimator=ESTIMATORS[estimator],
        subspace=SubspaceGradient(tau=3, nu=0.1),
        cuda_graph=graphed,
    )
    Trainer(
        max_steps=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, SubjectData(str(tmp_path), class_word="ball", seed=0))
    return module.adapter.theta.detach().cpu()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_replaying_trains_the_same_token_bit_by_bit(tmp_path, monkeypatch, estimator):
    plain = token(tmp_path, False, estimator)
    monkeypatch.setattr("mep_lightning.module.CUDAGraphed", Replayed)
    monkeypatch.setattr(PersonalizationModule, "takes_graph", lambda self, base: self.cuda_graph)
    monkeypatch.setattr(Replayed, "captures", 0)
    assert torch.equal(token(tmp_path, True, estimator), plain)
    assert Replayed.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_graph_on_a_gpu_trains_the_same_token_bit_by_bit(tmp_path, estimator):
    assert torch.equal(token(tmp_path, True, estimator, "cuda"), token(tmp_path, False, estimator, "cuda"))


def test_other_shapes_are_captured_apart(monkeypatch):
    monkeypatch.setattr(Replayed, "captures", 0)
    double = Replayed(lambda x: 2 * x)
    for size in (2, 3, 2, 3):
        x = torch.randn(size)
        assert torch.equal(double(x), 2 * x)
    assert Replayed.captures == 2


class Refused(CUDAGraphed):
    asked = 0

    def capture(self, *arguments):
        Refused.asked += 1
        raise UserError("the step cannot be captured as a CUDA graph")


def test_what_cannot_be_captured_is_called_as_it_is_unless_it_must_be(monkeypatch):
    monkeypatch.setattr(Refused, "asked", 0)
    double = Refused(lambda x: 2 * x, insists=False)
    with pytest.warns(UserWarning, match="launching kernels one by one: the step cannot be captured"):
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    assert Refused.asked == 1
    with pytest.raises(UserError, match="cannot be captured"):
        Refused(lambda x: x)(torch.ones(2))


def test_a_graph_that_memory_is_short_for_is_done_without(monkeypatch):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CUDAGraphed, "capture", full)
    double = CUDAGraphed(lambda x: 2 * x, insists=False)
    with pytest.warns(UserWarning, match="one by one: CUDA out of memory"):
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(torch.OutOfMemoryError):
        CUDAGraphed(lambda x: x)(torch.ones(2))


@pytest.mark.parametrize(
    ("settings", "takes"), [({}, True), ({"compile": True}, False), ({"cuda_graph": False}, False)], ids=str
)
def test_a_step_on_a_gpu_is_a_graph_by_itself(tiny_base, settings, takes):
    module = PersonalizationModule(
        adapter=TokenEmbedding(init="ball"), estimator=RandomGradientEstimator(n=2), **settings
    )
    on_gpu = MagicMock(device=torch.device("cuda"), offload="none")
    assert module.takes_graph(on_gpu) is takes
    assert not module.takes_graph(tiny_base)


def test_an_answer_is_not_overwritten_by_the_next():
    double = Replayed(lambda x: 2 * x)
    first = double(torch.ones(2))
    double(torch.zeros(2))
    assert torch.equal(first, torch.full((2,), 2.0))


def test_graphs_are_forgotten_before_the_weights_move(tiny_base):
    graph = Replayed(lambda x: x)
    graph(torch.ones(1))
    tiny_base.graphs.append(graph)
    try:
        with tiny_base.parked():
            assert not graph._captured
        graph(torch.ones(1))
        tiny_base.pipeline(None)
        assert not graph._captured  # pictures need the memory
    finally:
        tiny_base.graphs.clear()


def test_without_a_gpu_the_switch_changes_nothing(tiny_base):
    module = PersonalizationModule(
        adapter=TokenEmbedding(init="ball"), estimator=RandomGradientEstimator(n=2), cuda_graph=True
    )
    module.take(tiny_base)
    assert module.graphed is None and not tiny_base.graphs


def test_two_modules_may_share_a_base(tiny_base, monkeypatch):
    monkeypatch.setattr(PersonalizationModule, "takes_graph", lambda self, base: True)
    modules = [PersonalizationModule(adapter=TokenEmbedding(init="ball"), cuda_graph=True) for _ in range(2)]
    try:
        for module in (*modules, modules[0]):
            module.take(tiny_base)
        assert {id(graph) for graph in tiny_base.graphs} == {id(module.graphed) for module in modules}
        assert len(tiny_base.graphs) == 2
    finally:
        tiny_base.graphs.clear()


def test_memory_that_runs_out_is_no_fault_of_the_graph(monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("CUDAGraph", "Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with pytest.raises(torch.OutOfMemoryError):
        CUDAGraphed(full)(torch.ones(1))


def test_all_captures_share_a_stream(monkeypatch):
    """PyTorch hands out 32 streams in turn, and cuBLAS would keep a workspace for each."""
    for name in ("CUDAGraph", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    streams, warmed, captured = MagicMock(side_effect=lambda device: MagicMock()), [], []
    monkeypatch.setattr(torch.cuda, "Stream", streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: warmed.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda _, pool, stream: captured.append(stream) or nullcontext())
    monkeypatch.setattr(cuda_graph, "capture_stream", functools.cache(cuda_graph.capture_stream.__wrapped__))
    for double in (CUDAGraphed(lambda x: 2 * x), CUDAGraphed(lambda x: x + x)):
        for _ in range(2):
            double(torch.ones(2))
            double.clear()  # pictures are drawn
    assert streams.call_count == 1 and len(captured) == 4
    assert {id(stream) for stream in (*warmed, *captured)} == {id(warmed[0])}


@pytest.mark.parametrize(
    ("switches", "why"),
    [
        ({"cuda_graph": True}, "cuda_graph does nothing here: it is for a GPU"),
        ({"cuda_graph": True, "offload": "stream"}, "cuda_graph does nothing here: model.offload is stream"),
        ({"compile": True, "offload": "stream"}, "compile does nothing here: model.offload is stream"),
    ],
)
def test_a_switch_that_does_nothing_says_so(switches, why):
    module = PersonalizationModule(
        adapter=TokenEmbedding(init="ball"), estimator=RandomGradientEstimator(n=2), **switches
    )
    module.load()
    with pytest.warns(UserWarning, match=why):
        warn_of_idle_switches(module, module.base)
    assert module.predict_noise is predict_noise


def test_what_cannot_be_captured_is_said_with_the_mend(monkeypatch):
    class Broken:
        def __init__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    with pytest.raises(
        UserError, match=r"CUDA graph \(operation not permitted .*capturing\): set model.cuda_graph false"
    ):
        CUDAGraphed(lambda x: x)(torch.ones(1))
