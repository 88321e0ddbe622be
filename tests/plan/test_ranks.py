"""What one of several processes takes: its share of a step, and what it keeps and makes for the others."""

import gc

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.performance.memory import allocated_peak
from mep_lightning import PersonalizationModule
from mep_lightning.adapters import FullUNet, LoRA, TokenEmbedding
from mep_lightning.advice import refuse_ranks
from mep_lightning.bases import open_base
from mep_lightning.commands.budget import recipe
from mep_lightning.defaults import METHODS
from mep_lightning.distributed import ALONE, STRATEGIES, Ranks
from mep_lightning.estimators import (
    CMAES,
    ForwardGradientEstimator,
    OnePointEstimator,
    RandomGradientEstimator,
    SPSAEstimator,
)
from mep_lightning.plan import plan, rehearse
from mep_lightning.plan.rehearsal import Unheard, step
from mep_lightning.plan.rows import strategy_of
from mep_lightning.plan.tracker import LiveBytes

ADAPTERS = {"token": TokenEmbedding, "LoRA": LoRA, "full": FullUNet}
MEMBERS, DATA, DDP = (Ranks(world=2, shared=shared) for shared in ("members", "data", None))
LATENTS = torch.zeros(1, 4, 16, 16)
BATCH = {"mean": LATENTS, "std": LATENTS, "prompts": ["a photo of {}"]}


def made(adapter, ranks=ALONE, precision="fp32", **given):
    module = PersonalizationModule("tiny", precision, adapter=ADAPTERS[adapter](), **given)
    module.ranks, module.class_word = ranks, "ball"
    return module


def zeroth_order(adapter, estimator, ranks=ALONE):
    return made(adapter, ranks, "int8", estimator=estimator)


def planned(*modules):
    """The phases of modules of one precision."""
    return rehearse(modules, open_base("tiny", modules[0].precision), 64)


SHARES = {  # an estimator whose members so many ranks share -> one whose members are those of the rank that takes most
    "RGE": ("token", RandomGradientEstimator(n=5), 2, RandomGradientEstimator(n=2)),
    "RGE, unequal": ("token", RandomGradientEstimator(n=4), 2, RandomGradientEstimator(n=2)),
    "RGE of a LoRA": ("LoRA", RandomGradientEstimator(n=2), 3, OnePointEstimator(n=1)),  # theta itself takes less
    "SPSA of a LoRA": ("LoRA", SPSAEstimator(n=2), 2, OnePointEstimator(n=2)),  # one side of each
    "tangents": ("token", ForwardGradientEstimator(n=5), 2, ForwardGradientEstimator(n=3)),
    "CMA-ES": ("token", CMAES(population=7, dims=8), 2, CMAES(population=4, dims=8)),
}


@pytest.fixture(scope="module")
def steps():
    """Of every case: a step of its ranks, and of the share alone."""
    modules = []
    for adapter, whole, world, share in SHARES.values():
        modules.append(zeroth_order(adapter, whole, Ranks(world=world, shared="members")))
        modules.append(zeroth_order(adapter, share))
    found = [phases["step"] for phases in planned(*modules)]
    return dict(zip(SHARES, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("case", SHARES)
def test_a_rank_takes_what_a_run_of_its_members_takes(steps, case):
    shared, alone = steps[case]
    assert shared.total == pytest.approx(alone.total, abs=4096)  # beside it losses, and the tokens of a whole search


def test_who_shares_data_evaluates_all_members():
    alone, data = (zeroth_order("token", RandomGradientEstimator(n=4), ranks) for ranks in (ALONE, DATA))
    first, second = planned(alone, data)
    assert first["step"] == second["step"]


@pytest.mark.parametrize("adapter", ["token", "LoRA"])
def test_a_share_takes_what_was_planned(adapter):
    """The first of two ranks, with the exchange left out."""
    (phases,) = planned(zeroth_order(adapter, SPSAEstimator(n=2), MEMBERS))
    module = zeroth_order(adapter, SPSAEstimator(n=2), Unheard(0, 2, "members"))
    module.load()
    step(module, module.estimator, BATCH)  # whatever is made once
    measured = allocated_peak(lambda: step(module, module.estimator, BATCH))
    assert phases["step"].activations == pytest.approx(measured, rel=0.1, abs=1.2e6)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("adapter", ["LoRA", "full"])
def test_ddp_takes_what_was_planned(adapter):
    """Its buckets, and a bucket of the gradients once more while they are averaged."""
    (phases,) = planned(made(adapter, DDP))
    module = made(adapter, Unheard(0, 2, None))
    module.load()
    with LiveBytes() as live:
        live.hold(list(module.adapter.parameters()))
        trained = live.now
        wrapped = DistributedDataParallel(module)  # as Lightning makes it
    assert phases["step"].buckets == phases["denoise"].buckets == live.now - trained == trained
    gc.collect()  # or what other tests held is given back meanwhile
    measured = allocated_peak(lambda: step(wrapped.module, module.estimator, BATCH))
    assert phases["step"].gradients + phases["step"].activations == pytest.approx(measured, rel=0.1, abs=1e6)


@pytest.mark.parametrize("bucket", [1 << 24, 1 << 20], ids=["all at once", "in buckets"])
def test_averaging_gradients_takes_a_bucket_beside_them(bucket, monkeypatch):
    monkeypatch.setattr("mep_lightning.distributed.BUCKET", bucket)
    alone, own, ddp = planned(*(made("full", ranks, checkpointing=True) for ranks in (ALONE, MEMBERS, DDP)))
    exchanged = own["step"].activations / min(4 * bucket, own["step"].gradients)
    assert 1 <= exchanged <= 2  # those of convolutions are brought into another order on their way
    assert own["step"].activations > alone["step"].activations
    assert own["step"].buckets == 0 and own["denoise"] == alone["denoise"]
    assert ddp["step"].total - own["step"].total == own["step"].gradients
    assert alone["load"] == own["load"] == ddp["load"]


def rows(*names, **given):
    """The plan of recipes, by method."""
    recipes = {name: recipe(name) for name in names}
    plainly = lambda offload, checkpointing: (offload, checkpointing) == ("none", False)  # noqa: E731
    return {row.method: row for row in plan(recipes, "tiny", precisions=["int8"], asked=plainly, **given)}


def test_every_method_is_shared_as_suits_it():
    alone, shared = rows("zoodip", "lora"), rows("zoodip", "lora", devices=2)
    assert {name: row.strategy for name, row in shared.items()} == {"zoodip": "zo_ddp", "lora": "ddp"}
    assert shared["zoodip"].launch == ["--trainer.devices", "2", "--trainer.strategy", "zo_ddp"]
    assert alone["zoodip"].launch == [] and alone["zoodip"].as_dict(None)["devices"] == 1
    assert shared["zoodip"].phases["step"].activations < 0.7 * alone["zoodip"].phases["step"].activations
    assert [name for name, row in shared.items() if row.phases["denoise"].buckets] == ["lora"]
    for name, row in shared.items():  # who draws pictures later is alone
        assert row.inference_peak_bytes == alone[name].inference_peak_bytes


@pytest.mark.parametrize("name", METHODS)
def test_the_strategy_that_suits_a_method_is_one_it_takes(name):
    module = recipe(name)("int4" if name == "qlora" else "int8", None)
    assert strategy_of(module) == ("zo_ddp" if name.startswith(("zoodip", "gf_ti", "selective")) else "ddp")
    module.fill_in_defaults("sd1")
    refuse_ranks(module, Ranks(world=2, shared=STRATEGIES[strategy_of(module)]))


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("zoodip", {"devices": 2, "strategy": "ddp"}, "zoodip has none to average: set trainer.strategy zo_ddp"),
        ("selective", {"devices": 3}, "3 processes cannot share the 2 members of a step: raise model.estimator.n, or"),
    ],
    ids=["no gradients", "too few members"],
)
def test_a_method_that_cannot_be_shared_so_is_left_out_and_told(name, given, why):
    told = {}
    assert rows(name, left_out=told.__setitem__, **given) == {}
    assert list(told) == [name] and why in told[name]
