"""Several processes train as one: the same bits everywhere, those of one process, and little that travels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from mep_lightning.distributed import LostRankError, Ranks, ZerothOrderStrategy, tell_of_killed
from mep_lightning.errors import UserError
from mep_lightning.quantization import why_not_int4
from tests import ranks

ROUNDING = 1e-6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 0.1
"""Others round a row by how many there are, and a finite difference makes the most of it: .035 of a LoRA's factors."""
ZEROTH_ORDER = ("zoodip", "zoodip_fast", "tangents", "zeroth-order lora", "zeroth-order hollowed_net", "gf_ti")
BACKPROP = ("textual_inversion", "lora", "peqa", "tuneqdm", "dreambooth", "hollowed_net")
SHARED = [f"zo_ddp:{case}" for case in (*ZEROTH_ORDER, "selective", "drifted")]
INT4 = ["ddp:qlora"] if why_not_int4() is None else []
OWN = [
    *INT4,
    "zo_ddp_data:zoodip",
    *(f"ddp:{case}" for case in BACKPROP),
    "zo_ddp:textual_inversion",
    "ddp:a user's own",
]


def together(folder: Path, devices: int, *runs: str) -> dict[str, list[dict]]:
    """What every rank came to, of runs that so many processes share."""
    command = [sys.executable, "-m", "tests.ranks", str(folder), str(devices), *runs]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {run: [torch.load(folder / f"{run}.{rank}") for rank in range(devices)] for run in runs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    return together(folder, 2, *SHARED, *OWN)


def distance(found, module) -> float:
    """The largest between what was trained and a module's, relative to its length."""
    theta = module.adapter.numbered()
    return max(((found[k] - theta[k]).norm() / theta[k].norm()).item() for k in theta)


@pytest.mark.slow
@pytest.mark.parametrize("run", [*SHARED, *OWN])
def test_all_ranks_hold_the_same_bits(two, run):
    first, second = two[run]
    assert all(torch.equal(first["theta"][k], second["theta"][k]) for k in first["theta"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ZEROTH_ORDER)
def test_members_shared_out_are_those_of_one_process(two, folder, case):
    assert distance(two[f"zo_ddp:{case}"][0]["theta"], ranks.fitted(case, folder, devices=1)) < ROUNDING


@pytest.mark.slow
def test_who_holds_other_values_takes_the_firsts(two):
    assert torch.equal(two["zo_ddp:drifted"][1]["theta"][0], two["zo_ddp:zoodip"][0]["theta"][0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ZEROTH_ORDER)
def test_little_travels(two, case):
    renewals = 4 * 32  # sums of the bits of bases, and of what was trained at the start
    lora = {"zeroth-order lora": 4, "zeroth-order hollowed_net": 4}
    shares = (lora | {"zoodip": 8, "zoodip_fast": 5, "tangents": 5, "gf_ti": 6})[case]
    sent = two[f"zo_ddp:{case}"][0]["sent"]
    assert 0 < sent <= 4 * shares * ranks.STEPS + renewals
    assert sent / ranks.STEPS <= 64 * shares  # the promise
    assert 0 < two[f"zo_ddp:{case}"][0]["logged"] <= sent  # of the last step that was logged


@pytest.mark.slow
def test_ranks_with_photos_of_their_own_take_the_mean(two, monkeypatch):
    """What two processes come to is what one comes to that draws twice a step."""
    made = ranks.module("textual_inversion")
    theirs = two["ddp:textual_inversion"][0]["theta"]
    draws = made.draw_at

    def twice(members, draw):
        """Both ranks' losses, averaged; `draw` is not asked."""
        data, step = made.trainer.datamodule, made.global_step
        both = [draws(dict(data.batch(index)), index) for index in (2 * step, 2 * step + 1)]
        return sum(type(made).losses(made, members, one) for one in both) / 2

    monkeypatch.setattr(made, "losses", twice)
    monkeypatch.setattr(ranks, "module", lambda case: made)
    ranks.fitted("textual_inversion", devices=1)
    assert ((theirs[0] - made.adapter.theta).norm() / made.adapter.theta.norm()).item() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zo_ddp:textual_inversion", "ddp:a user's own"])
def test_backpropagation_is_the_same_whoever_asks_for_it(two, way):
    one, other = two["ddp:textual_inversion"][0], two[way][0]
    torch.testing.assert_close(one["theta"][0], other["theta"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("two")
def test_the_first_stage_of_a_hollowed_net_is_shared_out(folder, tmp_path):
    ranks.fitted("hollowed_net", tmp_path, devices=1)
    shared, alone = (one / "hollowed_net" / "activations.bin" for one in (folder, tmp_path))
    assert shared.read_bytes() == alone.read_bytes()


@pytest.mark.slow
def test_four_processes(tmp_path):
    found = together(tmp_path, 4, "zo_ddp:zoodip", "zo_ddp_data:selective")
    for run in found.values():
        assert all(torch.equal(run[0]["theta"][k], other["theta"][k]) for other in run[1:] for k in other["theta"])
    assert distance(found["zo_ddp:zoodip"][0]["theta"], ranks.fitted("zoodip", devices=1)) < ROUNDING


@pytest.mark.parametrize(("error", "told"), [(RuntimeError, LostRankError), (torch.OutOfMemoryError,) * 2])
def test_an_exchange_that_fails_is_a_lost_process_but_for_memory(error, told, monkeypatch):
    def fails(*_):
        raise error("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_reduce", fails)
    with pytest.raises(told):
        Ranks(0, 2, "members").averaged_(torch.zeros(3))


@pytest.mark.parametrize(("name", "given"), [("barrier", ()), ("broadcast", (1,)), ("reduce", (torch.zeros(1),))])
def test_lightnings_own_exchanges_tell_of_a_lost_process_too(name, given, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(DDPStrategy, name, fails)
    monkeypatch.setattr(ZerothOrderStrategy, "world_size", 2)
    with pytest.raises(LostRankError, match="one of the 2 processes"):
        getattr(ZerothOrderStrategy(), name)(*given)


def test_what_is_shared_is_one_of_two():
    with pytest.raises(UserError, match=r"ZerothOrderStrategy\.shared is steps; use one of members, data"):
        ZerothOrderStrategy(shared="steps")


class Twin(Ranks):
    """Two ranks, the other of which has the same numbers and one more; what is exchanged is noted."""

    def _reduce_(self, numbers, how=None):
        exchanged.append(len(numbers))
        numbers += numbers + 1


exchanged: list[int] = []


@pytest.mark.parametrize(("bucket", "lengths"), [(100, [19]), (7, [6, 8, 5]), (1, [2, 4, 8, 5])], ids=str)
def test_gradients_are_averaged_bucket_by_bucket(bucket, lengths, monkeypatch):
    monkeypatch.setattr("mep_lightning.distributed.BUCKET", bucket)
    exchanged.clear()
    trained = [torch.zeros(shape, requires_grad=True) for shape in ((2,), (1, 2, 2, 1), (8,), (5,))]
    for i, theta in enumerate(trained[:-1]):
        theta.grad = torch.arange(theta.numel(), dtype=torch.float32).view(theta.shape) * i
    trained[1].grad = trained[1].grad.to(memory_format=torch.channels_last)
    before = [theta.grad.clone() for theta in trained[:-1]] + [torch.zeros(5)]
    Twin(0, 2).average_gradients_(trained)
    assert exchanged == lengths
    assert all(torch.equal(theta.grad, grad + 0.5) for theta, grad in zip(trained, before, strict=True))


def test_a_process_that_a_signal_kills_is_told_at_once_and_one_that_ends_is_not(capfd):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    ends, sleeper = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"]), subprocess.Popen(sleeps)
    sleeper.kill()
    tell_of_killed([ends, sleeper])
    assert "was killed (SIGKILL): the others end." in capfd.readouterr().err
    ends.wait()
    tell_of_killed([ends])
    assert capfd.readouterr().err == ""
