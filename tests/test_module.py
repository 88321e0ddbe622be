"""The training step: what is trained, what stays, and that its gradient is the loss's."""

import copy
import dataclasses
import math

import pytest
import torch

from mep_lightning import PersonalizationModule, SubjectData, defaults
from mep_lightning.adapters import LoRA, TokenAndLoRA, TokenEmbedding
from mep_lightning.adapters.lora_layers import LoRALinear
from mep_lightning.bases import load_base, predict_noise
from mep_lightning.callbacks import PUTS
from mep_lightning.draws import step_generator
from mep_lightning.errors import UserError
from mep_lightning.estimators import (
    Backprop,
    RandomGradientEstimator,
    SPSAEstimator,
    SubspaceGradient,
)
from mep_lightning.evaluation import generate
from mep_lightning.quantization import Int4Linear, Int8Conv2d, Int8Linear, why_not_int4
from tests.personalizing import ESTIMATORS, fitted, module, trainer


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_takes_one_counted_step_a_batch(estimator, tmp_path):
    mod, run = fitted(3, tmp_path, module(estimator))
    assert run.global_step == 3
    start = mod.base.text_encoders[0].get_input_embeddings().weight[mod.adapter._initial_id(mod.base, "ball")]
    assert mod.adapter.theta.shape == (1, 128)
    assert not torch.equal(mod.adapter.theta[0], start)


def test_the_base_is_left_alone_and_never_checkpointed(tmp_path):
    mod = module()
    mod.load()
    before = [copy.deepcopy(part.state_dict()) for part in (mod.base.unet, *mod.base.text_encoders)]
    fitted(3, tmp_path, mod)
    for state, part in zip(before, (mod.base.unet, *mod.base.text_encoders), strict=True):
        assert all(torch.equal(state[k], v) for k, v in part.state_dict().items())
    assert list(mod.state_dict()) == ["adapter.theta"]
    assert mod.base.vae is None  # freed before the first step


def test_directional_derivative_on_the_tiny_unet_is_jvp(tiny_base):
    """(L(theta + mu e) - L(theta - mu e)) / 2 mu along e, in float64, against forward-mode autograd."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mod = module("spsa")
    base = copy.copy(tiny_base)
    unet = copy.deepcopy(base.unet).to(memory_format=torch.contiguous_format)  # group_norm's jvp knows no other
    base.unet, base.text_encoders = unet.double(), [copy.deepcopy(base.text_encoders[0]).double()]
    base.dtype = torch.float64
    mod.base, mod.class_word = base, "ball"
    mod.adapter.attach(base)
    theta = mod.adapter.theta.detach().double()
    g = torch.Generator().manual_seed(0)
    batch = {
        "mean": torch.randn(1, 4, 16, 16, generator=g),
        "std": torch.zeros(1, 4, 16, 16),
        "prompts": ["a photo of a {}"],
    }
    draw = mod.draw(batch)
    draw = type(draw)(draw.noisy.double(), draw.timestep, draw.target.double(), draw.prompts)

    def loss(members):
        return losses64(mod, members, draw)

    estimator = SPSAEstimator(n=1, mu=2e-5, seed=3)
    grad, losses = estimator.estimate(loss, theta, step=5)
    from mep_lightning.estimators.perturbation import direction

    e = direction(theta, 3, 5, 0)
    with sdpa_kernel(SDPBackend.MATH):
        primal, tangent = torch.func.jvp(lambda t: loss(t[None])[0], (theta,), (e,))
    assert tangent.abs() > 1e-6
    torch.testing.assert_close((grad * e).sum() / e.square().sum(), tangent, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.mean(), primal, rtol=1e-5, atol=0)

    exact, _ = Backprop().estimate(loss, theta)
    torch.testing.assert_close((exact * e).sum(), tangent, rtol=1e-8, atol=0)


def losses64(mod, members, draw):
    """The module's own losses, without its rounding to fp32."""
    from mep_lightning.bases import encode_prompts, predict_noise

    embeds = encode_prompts(mod.base, draw.prompts, mod.adapter.tokens(members))
    predicted = predict_noise(mod.base.unet, draw.noisy, draw.timestep, embeds)
    return (predicted.unflatten(0, (len(members), -1)) - draw.target).pow(2).flatten(1).mean(1)


def test_members_see_the_same_data_noise_and_timestep():
    mod = module()
    mod.class_word = "ball"
    mod.load()
    draw = mod.draw({"mean": torch.randn(2, 4, 16, 16), "std": torch.ones(2, 4, 16, 16), "prompts": ["a {}", "my {}"]})
    theta = mod.adapter.theta.detach()
    other = theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = mod.losses(torch.stack([theta, other, theta]), draw)
    assert together[0] == together[2] != together[1]
    assert draw.prompts == ["a <sks> ball", "my <sks> ball"]


def test_the_same_seed_gives_the_same_token_and_another_seed_another(tmp_path):
    runs = [fitted(4, tmp_path, module(seed=s))[0].adapter.theta for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("settings", [{"lr_scheduler": "cosin"}, {"lr": "fast"}, {"eps": "tiny"}], ids=str)
def test_an_unknown_word_is_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"model.{name} is .*; use "):
        PersonalizationModule(**settings)


def test_auto_becomes_what_the_base_needs(tiny_base):
    mod = PersonalizationModule(
        precision="int8",
        adapter=TokenEmbedding(init="ball"),
        estimator=RandomGradientEstimator(n="auto", mu="auto", standardize="auto"),
        subspace=SubspaceGradient(tau="auto", nu="auto"),
    )
    mod.load()
    values = defaults.lookup("zoodip", "tiny", "int8")
    for part, names in (
        (mod.estimator, ("n", "mu", "standardize")),
        (mod.subspace, ("tau", "nu")),
        (mod, ("lr", "lr_scheduler", "eps")),
    ):
        assert {name: getattr(part, name) for name in names} == {name: values[name] for name in names}


def test_a_part_given_to_two_modules_belongs_to_neither():
    estimator, subspace = RandomGradientEstimator(n="auto", seed=None), SubspaceGradient(tau="auto")
    modules = [
        PersonalizationModule(
            precision=precision, seed=seed, adapter=TokenEmbedding(init="ball"), estimator=estimator, subspace=subspace
        )
        for seed, precision in enumerate(("fp32", "bf16"))
    ]
    for mod in modules:
        mod.load()
    assert [mod.estimator.seed for mod in modules] == [0, 1]
    assert (estimator.seed, estimator.n, subspace.tau) == (None, "auto", "auto")
    modules[0].subspace.observe(torch.zeros(3))
    assert modules[1].subspace.seen == 0


def test_data_given_to_two_modules_follows_each_ones_seed(tmp_path):
    data = SubjectData()
    orders = []
    for seed in (0, 1):
        trainer(1, tmp_path).fit(module(seed=seed), data)
        orders.append([data.batch(step)["rows"] for step in range(20)])
    assert orders[0] != orders[1]


def test_auto_without_a_default_is_said():
    mod = PersonalizationModule(estimator=RandomGradientEstimator(n="auto"), method="textual_inversion")
    with pytest.raises(UserError, match="RandomGradientEstimator.n is auto, and textual_inversion has no default"):
        mod.load()


def test_pictures_are_drawn_where_the_base_is_although_the_trainer_left_the_token_elsewhere(tiny_base, monkeypatch):
    mod = module()
    mod.take(tiny_base)
    asked = []
    monkeypatch.setattr(mod.adapter, "to", asked.append)
    with mod.drawing():
        assert asked == []
    monkeypatch.setattr(tiny_base, "device", torch.device("cuda"))
    with mod.drawing():
        assert asked == [torch.device("cuda")]


def test_a_steps_gradients_make_room_for_pictures(tiny_base):
    mod = module()
    mod.take(tiny_base)
    mod.adapter.theta.grad = torch.ones_like(mod.adapter.theta)
    with mod.drawing():
        assert mod.adapter.theta.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [TokenEmbedding(init="ball"), LoRA(rank=2)], ids=["token", "lora"])
def test_pictures_are_drawn_after_a_run_on_a_gpu(tmp_path, adapter):
    mod = PersonalizationModule(adapter=adapter, estimator=Backprop(), lr=1e-3)
    fitted(2, tmp_path, mod, accelerator="gpu", devices=1)
    (image,) = generate(mod, ["a photo of a <sks> ball"], [0], steps=2)
    assert image.size == (64, 64)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_int8_stays_int8_under_every_trainer_precision(precision, tmp_path):
    mod, _ = fitted(2, tmp_path, module(precision="int8"), precision=precision)
    layers = [m for part in mod.base.modules() for m in part.modules() if isinstance(m, (Int8Linear, Int8Conv2d))]
    assert len(layers) > 100
    assert all(m.weight.dtype == torch.int8 and m.scale.dtype == torch.float32 for m in layers)
    plain = [
        m
        for m in mod.base.unet.modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and not isinstance(m, (Int8Linear, Int8Conv2d))
    ]
    assert not plain
    assert mod.adapter.theta.dtype == torch.float32
    assert all(s["exp_avg"].dtype == torch.float32 for s in mod.trainer.optimizers[0].state.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_bf16_trainer_does_not_round_finite_differences(precision, tmp_path):
    plain, _ = fitted(3, tmp_path, module())
    mixed, _ = fitted(3, tmp_path, module(), precision=precision)
    assert torch.equal(plain.adapter.theta, mixed.adapter.theta)


def test_checkpointing_changes_no_gradient_and_keeps_less():
    found = []
    for checkpointing in (False, True):
        mod = module("backprop", checkpointing=checkpointing)
        mod.class_word = "ball"
        mod.load()
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        draw = mod.draw({"mean": latents, "std": torch.zeros_like(latents), "prompts": ["a photo of {}"]})
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            grad, _ = mod.estimator.estimate(lambda members, m=mod, d=draw: m.losses(members, d), mod.adapter.theta)
        found.append((grad, sum(kept)))
    (plain, all_kept), (recomputed, some_kept) = found
    assert torch.equal(plain, recomputed)
    assert some_kept < 0.5 * all_kept


def test_a_compiled_unet_predicts_what_it_did(monkeypatch):
    compile_, compiled = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled.append(f) or compile_(f, backend="aot_eager", **options)
    )
    found = []
    for switch in (False, True):
        mod = module(precision="int8", compile=switch)
        mod.class_word = "ball"
        mod.load()
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        draw = mod.draw({"mean": latents, "std": torch.zeros_like(latents), "prompts": ["a photo of {}"]})
        found.append(mod.estimator.estimate(lambda members, m=mod, d=draw: m.losses(members, d), mod.adapter.theta)[1])
    assert compiled == [predict_noise]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_an_estimator_of_ones_own_makes_its_own_gradient(tmp_path):
    class Clipped(RandomGradientEstimator):
        def estimate(self, loss_fn, theta, step=0, dims=None):
            grad, losses = super().estimate(loss_fn, theta, step, dims)
            return grad.clamp(-1e-4, 1e-4), losses

    mod = PersonalizationModule(adapter=TokenEmbedding(init="ball"), estimator=Clipped(n=2), lr=5e-3, eps=1e-3)
    mod, _ = fitted(1, tmp_path, mod)
    assert mod.adapter.theta.grad.abs().max() <= 1e-4


def test_16_mixed_is_refused():
    class Fake:
        precision = "16-mixed"

    mod = module()
    mod._trainer = Fake()
    with pytest.raises(UserError, match="trainer.precision 16-mixed .* 32-true"):
        mod.setup("fit")


def test_v_prediction_trains_on_v():
    mod = module()
    mod.class_word = "ball"
    base = mod.load()
    batch = {"mean": torch.randn(2, 4, 16, 16), "std": torch.zeros(2, 4, 16, 16), "prompts": ["a {}", "the {}"]}
    epsilon = mod.draw(batch)
    base.info = dataclasses.replace(base.info, prediction="v_prediction")
    v = mod.draw(batch)
    assert torch.equal(epsilon.noisy, v.noisy) and torch.equal(epsilon.timestep, v.timestep)
    alpha = base.scheduler.alphas_cumprod[v.timestep].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    latents = batch["mean"] * base.scaling_factor
    torch.testing.assert_close(v.target, alpha * epsilon.target - sigma * latents, rtol=1e-4, atol=1e-5)


def test_half_precision_with_a_small_mu_is_said_aloud():
    with pytest.warns(UserWarning, match=r"mu 0.001 drowns in the rounding of bfloat16 activations"):
        module(precision="bf16").load()
    automatic = PersonalizationModule(precision="bf16", estimator=RandomGradientEstimator(mu="auto"))
    automatic.class_word = "ball"
    with pytest.warns(UserWarning, match="a finite difference in bfloat16 errs by its half and more at any mu"):
        automatic.load()
    assert automatic.estimator.mu == 3e-2


def test_several_vectors_batches_and_flips_together(tmp_path):
    mod = module(vectors=2, precision="int8", subspace=SubspaceGradient(tau=4, nu=0.1))
    trainer(6, tmp_path).fit(mod, SubjectData(batch_size=2, flip=True))
    start = mod.base.text_encoders[0].get_input_embeddings().weight[mod.adapter._initial_id(mod.base, "ball")]
    assert mod.adapter.theta.shape == (2, 128)
    assert not torch.equal(mod.adapter.theta[0], start) and not torch.equal(*mod.adapter.theta)


def test_puts_narrows_the_timesteps(tmp_path):
    mod, _ = fitted(1, tmp_path, callbacks=[PUTS(500, 900)])
    drawn = mod.timesteps.sample(4000, step_generator(0, 0))
    assert drawn.dtype == torch.int64 and drawn.min() == 500 and drawn.max() == 899


def test_training_lowers_the_loss_it_is_trained_on(tmp_path):
    """30 exact steps on one fixed draw: the step must go downhill."""
    mod = module("backprop", lr=1e-2)
    mod.class_word = "ball"
    mod.load()
    data = SubjectData()
    data.encode(mod.base)
    draw = mod.draw(data.batch(0))
    theta = mod.adapter.theta
    optimizer = mod.configure_optimizers()
    first = last = None
    for _ in range(30):
        grad, losses = mod.estimator.estimate(lambda m: mod.losses(m, draw), theta)
        first, last = (losses[0] if first is None else first), losses[0]
        theta.grad = grad
        optimizer.step()
    assert last < first


@pytest.mark.parametrize(
    "settings",
    [
        *({"lr": lr} for lr in (-1.0, 0.0, math.nan, math.inf)),
        *({"eps": eps} for eps in (0.0, -1e-8, math.nan)),
        *({"betas": betas} for betas in ((0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9))),
        *({"weight_decay": decay} for decay in (-0.1, math.nan)),
        *({"seed": seed} for seed in (-1, 2**63)),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"model.{name} is .*; use "):
        PersonalizationModule(**settings)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_packs_weights_is_in_fp32_whatever_torchs_default(precision):
    if precision == "int4" and why_not_int4():
        pytest.skip("no bitsandbytes")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as a bf16-true Trainer has it during a step
        layer = (Int8Linear if precision == "int8" else Int4Linear)(64, 64)
    finally:
        torch.set_default_dtype(before)
    assert {"int8": "scale", "int4": "absmax"}[precision] in dict(layer.named_buffers())
    for name, buffer in layer.named_buffers():
        assert not buffer.is_floating_point() or name == "bias" or buffer.dtype == torch.float32


def test_a_graph_goes_with_the_fit_that_captured_it(tmp_path, monkeypatch):
    monkeypatch.setattr(PersonalizationModule, "takes_graph", lambda self, base: True)
    monkeypatch.setattr(
        "mep_lightning.bases.cuda_graph.CUDAGraphed.__call__", lambda self, *given: self.function(*given)
    )
    mod, _ = fitted(2, tmp_path, module())
    assert mod.graphed is None and not mod.base.graphs


def test_pictures_are_not_drawn_with_what_another_module_has_put_into_the_base():
    base = load_base("tiny", vae=False)
    first, second = (PersonalizationModule(adapter=LoRA(rank=2), method="lora") for _ in range(2))
    token = PersonalizationModule(adapter=TokenEmbedding(init="ball"))
    for mine, other in ((first, second), (token, first), (first, token)):
        mine.take(base)
        generate(mine, ["a ball"], [0], steps=1)
        other.take(base)
        with pytest.raises(UserError, match="another adapter has been taken into the base of this .* since: call mod"):
            generate(mine, ["a ball"], [0], steps=1)
        mine.take(base)
        generate(mine, ["a ball"], [0], steps=1)


def test_a_token_learns_on_the_base_and_not_on_what_another_module_learned():
    base = load_base("tiny", vae=False)
    lora = PersonalizationModule(adapter=LoRA(rank=2))
    lora.take(base)
    both = PersonalizationModule(adapter=TokenAndLoRA(TokenEmbedding(init="ball"), LoRA(rank=2)))
    both.take(base)
    both.take(base)
    assert base.guest is both.adapter.lora and len(both.adapter.layers) == 80 and not lora.adapter.layers
    token = PersonalizationModule(adapter=TokenEmbedding(init="ball"))
    token.take(base)
    assert base.guest is None and not any(isinstance(part, LoRALinear) for part in base.unet.modules())
