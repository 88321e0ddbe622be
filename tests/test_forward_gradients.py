"""Forward gradients of a whole training step: exact along every direction, for every adapter, base and precision."""

import pytest
import torch
from lightning import Trainer

from benchmarks.performance.made_up import found
from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenAndLoRA, TokenEmbedding
from mep_lightning.bases.skeleton import packaged
from mep_lightning.callbacks import PUTS, HollowedActivations
from mep_lightning.commands.keeping import LastCheckpoint
from mep_lightning.errors import UserError
from mep_lightning.estimators import Backprop, ForwardGradientEstimator, RandomGradientEstimator, SubspaceGradient
from mep_lightning.estimators.perturbation import directions
from mep_lightning.plan import rehearse
from mep_lightning.plan.rehearsal import denoise, made_up_batch
from mep_lightning.selection import ConstantSelector

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
ADAPTERS = {
    "token": lambda: TokenEmbedding(init="ball", vectors=2),
    "lora": lambda: LoRA(rank=4, targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"]),
    "lora, down frozen": lambda: LoRA(rank=4, freeze_down=True),
    "token and lora": lambda: TokenAndLoRA(TokenEmbedding(init="ball"), LoRA(rank=4)),
}
N = 4


def module(adapter="token", precision="fp32", **settings):
    settings = {"estimator": ForwardGradientEstimator(n=N, seed=1)} | settings
    made = PersonalizationModule("tiny", precision, adapter=ADAPTERS[adapter](), **settings)
    made.class_word = "ball"
    return made


def away_from_zero(made):
    """A LoRA begins at zero, where half of its derivatives are."""
    generator = torch.Generator().manual_seed(0)
    for name, theta in made.adapter.named_parameters():
        if ".up." in f".{name}":
            theta.data.normal_(std=0.1, generator=generator)


def drawn(made, side=64):
    batch = made_up_batch(made.base, side, batch_size=2)
    batch["mean"] = torch.randn(batch["mean"].shape, generator=torch.Generator().manual_seed(0))
    return made.draw(batch | {"std": torch.zeros_like(batch["mean"])})


def exact_slopes(made, draw, step):
    trained = made.adapter.numbered()
    Backprop().backward(lambda members: made.losses(members, draw), trained.values())
    found = torch.zeros(N, dtype=torch.float64)
    for param_id, theta in trained.items():
        for i, e in enumerate(directions(theta, 1, step, range(N), param_id)):
            found[i] += (e.double() * theta.grad.double()).sum()
    return found


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_slopes_are_those_of_the_exact_gradient(adapter, precision):
    made = module(adapter, precision)
    made.load()
    away_from_zero(made)
    draw, trained = drawn(made), made.adapter.numbered()
    weights, losses = made.estimator.weigh(lambda members: made.losses(members, draw), 1, 3, trained)
    with torch.no_grad():
        torch.testing.assert_close(
            losses, made.losses(RandomGradientEstimator().around(3), draw)[:1], rtol=1e-5, atol=0
        )
    exact = exact_slopes(made, draw, 3)
    torch.testing.assert_close(weights.double() * N, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_does_not_drown_them(dtype):
    """Where a finite difference of mu 1e-3 is off by a multiple of what it should be."""
    plain, half = module(precision="fp32"), module(precision=dtype)
    slopes = {}
    for made in (plain, half):
        made.load()
        draw = drawn(made)
        slopes[made] = made.estimator.weigh(lambda members, m=made, d=draw: m.losses(members, d), 1)[0]
    finite = RandomGradientEstimator(n=N, mu=1e-3, seed=1)
    drowned = finite.weigh(lambda members: half.losses(members, draw), 1)[0]
    error, scale = (slopes[half] - slopes[plain]).norm(), slopes[plain].norm()
    assert error < 0.05 * scale
    assert (drowned - slopes[plain]).norm() > 10 * error


def test_what_comes_before_the_text_is_computed_once():
    made = module()
    made.load()
    shapes = []
    unet = made.base.unet
    for layer in (unet.conv_in, unet.time_embedding, unet.conv_out):
        layer.register_forward_hook(lambda _, args, __: shapes.append(type(args[0]).__name__))
    made.estimator.weigh(lambda members: made.losses(members, drawn(made)), 1)
    assert shapes == ["Tensor", "Tensor", "Dual"] or shapes == ["Parameter", "Tensor", "Dual"]


# -- training ----------------------------------------------------------------------------------------------------------


def fitted(folder, made, steps=3, callbacks=(), ckpt=None):
    torch.manual_seed(0)
    trainer = Trainer(max_steps=steps, callbacks=[*callbacks, LastCheckpoint(100)], default_root_dir=folder, **QUIET)
    trainer.fit(made, SubjectData(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return [theta.detach().clone() for theta in made.adapter.parameters()]


def test_a_run_with_every_part_learns_and_resumes_bitwise(tmp_path):
    def made():
        return module(precision="int8", activations="bf16", subspace=SubspaceGradient(tau=3))

    callbacks = [PUTS(200, 900)]
    whole = fitted(tmp_path / "whole", made(), 6, callbacks)
    fitted(tmp_path / "parts", made(), 4, callbacks)
    again = fitted(tmp_path / "parts", made(), 6, callbacks, ckpt=str(tmp_path / "parts/checkpoints/last.ckpt"))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_it_goes_where_a_finite_difference_goes(tmp_path):
    """In fp32 a small mu and none at all are nearly the same run."""
    tangent = fitted(tmp_path / "a", module(estimator=ForwardGradientEstimator(n=4, seed=0)))[0]
    finite = fitted(tmp_path / "b", module(estimator=RandomGradientEstimator(n=4, mu=1e-3, seed=0)))[0]
    start = module()
    start.load()
    moved = finite - start.adapter.theta.detach()
    assert (tangent - finite).norm() < 0.05 * moved.norm()


def test_selective_takes_them_at_high_resolution(tmp_path):
    made = module("lora", selector=ConstantSelector(0.5), low_resolution=32)
    before = module("lora")
    before.load()
    after = fitted(tmp_path, made, 4)
    assert all((a != b).any() for a, b in zip(after, before.adapter.parameters(), strict=True))


def test_a_hollowed_unet_takes_them(tmp_path):
    hollowed = HollowedActivations(0.43, samples=4, folder=tmp_path / "kept")
    after = fitted(tmp_path, module("lora"), 2, [hollowed])
    assert all(theta.isfinite().all() for theta in after)


def test_streamed_weights_give_bitwise_the_same(tmp_path):
    resident = fitted(tmp_path / "a", module(precision="int8"))
    streamed = fitted(tmp_path / "b", module(precision="int8", offload="stream"))
    assert all(torch.equal(one, other) for one, other in zip(resident, streamed, strict=True))


def test_compiling_them_is_refused(tmp_path):
    with pytest.raises(UserError, match="model.compile does not go with ForwardGradientEstimator"):
        fitted(tmp_path, module(compile=True))


# -- other bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", packaged())
def test_every_layer_of_the_public_bases_has_a_rule(name):
    """In tensors that hold nothing, at a small picture: what is refused is refused here."""
    made = PersonalizationModule(name, "int8", adapter=TokenEmbedding(), estimator=ForwardGradientEstimator(n=2))
    (phases,) = rehearse([made], found(name, "int8", "cpu"), 64)
    assert phases["step"].activations > 0


# -- integer products --------------------------------------------------------------------------------------------------


def test_integer_products_keep_the_slopes():
    """Where they drown a finite difference: value and tangents round apart."""
    plain, integers = module(precision="int8"), module(precision="int8", activations="int8")
    slopes = []
    for made in (plain, integers):
        made.load()
        draw = drawn(made)
        slopes.append(made.estimator.weigh(lambda members, m=made, d=draw: m.losses(members, d), 1)[0])
    exact, found = slopes
    assert integers.base.dtype == torch.bfloat16
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_integer_products_are_for_training_alone(tmp_path):
    seen = []
    made = module(precision="int8", activations="int8")
    made.load()
    made.base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(
        lambda layer, *_: seen.append(layer.multiplies_integers)
    )
    made.estimator.weigh(lambda members: made.losses(members, drawn(made)), 1)
    denoise(made, 16, 1)
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"estimator": RandomGradientEstimator()}, "drown a finite difference"),
        ({"estimator": Backprop()}, "end a backward pass: take ForwardGradientEstimator"),
        ({"precision": "int4"}, "activations int8 are for int8 weights, and precision is int4"),
        ({"precision": "fp32"}, "activations int8 are for int8 weights, and precision is fp32"),
    ],
)
def test_integer_products_are_refused_elsewhere(settings, said):
    with pytest.raises(UserError, match=said):
        module(**({"precision": "int8", "activations": "int8"} | settings))
