"""LoRA: what peft's layers compute, for many members at once, in files that others read, over any precision."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mep_lightning.adapters import LoRA, lora_layers
from mep_lightning.adapters.targets import matching, undotted
from mep_lightning.bases import load_base, predict_noise
from mep_lightning.bases.load import build_unet
from mep_lightning.bases.skeleton import architecture
from mep_lightning.errors import UserError
from mep_lightning.estimators import RandomGradientEstimator, SPSAEstimator
from mep_lightning.estimators.perturbation import HERE, Members
from mep_lightning.quantization import Int8Conv2d, why_not_int4

PRECISIONS = ["fp32", "bf16", "int8", *([] if why_not_int4() else ["int4"])]


@pytest.fixture(scope="module")
def base():
    return load_base("tiny", vae=False)


def attached(base, **settings):
    adapter = LoRA(**{"rank": 4} | settings)
    adapter.attach(base, "ball")
    with torch.no_grad():  # as if trained
        for index, up in enumerate(adapter.up.values()):
            up.copy_(0.1 * torch.randn(up.shape, generator=torch.Generator().manual_seed(index)))
    return adapter


def inputs(base, batch=1):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 16, 16, generator=g).to(base.dtype)
    return latents, torch.full((batch,), 500), torch.randn(batch, 77, 128, generator=g).to(base.dtype)


@torch.no_grad()
def predicted(base, **given):
    return predict_noise(base.unet, *inputs(base), **given)


def test_starts_as_the_base_and_leaves_it_as_it_was(base):
    before, modules = predicted(base), list(base.unet.modules())
    adapter = LoRA(rank=4)
    adapter.attach(base)
    assert torch.equal(predicted(base), before)
    assert len(adapter.layers) == 80 and all(layer in base.unet.modules() for layer in adapter.layers)
    adapter.detach()
    assert list(base.unet.modules()) == modules and torch.equal(predicted(base), before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adds_the_low_rank_product_to_every_target(precision):
    base = load_base("tiny", precision, vae=False)
    adapter = attached(base, alpha=8.0)
    name, layer = next(iter(adapter._layers.items()))
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(base.dtype)
    down, up = adapter.down[name.replace(".", "_")], adapter.up[name.replace(".", "_")]
    with torch.no_grad():
        expected = layer.base_layer(x).double() + 2.0 * x.double() @ down.double().T @ up.double().T
        error = (layer(x).double() - expected).abs().max()
    assert error <= (2e-2 if base.dtype == torch.bfloat16 else 1e-5) * expected.abs().max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("estimator", [SPSAEstimator(2, mu=0.05), RandomGradientEstimator(3, mu=0.05)])
@pytest.mark.parametrize("beforehand", [True, False])
def test_members_computed_together_are_those_computed_alone(precision, estimator, beforehand):
    base = load_base("tiny", precision, vae=False)
    adapter = attached(base)
    members = estimator.around(step=3)
    if beforehand:
        members = members.drawn_for(adapter.numbered())
        assert len(members.noise) == 160
    with adapter.at(members):
        together = predicted(base, members=len(members), apart=adapter.layers)
    originals = {param_id: theta.detach().clone() for param_id, theta in adapter.numbered().items()}
    values = {param_id: members.of(theta, param_id) for param_id, theta in originals.items()}
    for index in range(len(members)):
        with torch.no_grad():
            for param_id, theta in adapter.numbered().items():
                theta.copy_(values[param_id][index])
        alone = predicted(base)
        scale = alone.float().abs().max()
        tolerance = 5e-2 if base.dtype == torch.bfloat16 else 2e-5
        assert (together[index].float() - alone[0].float()).abs().max() <= tolerance * scale
    assert not torch.allclose(together[0], together[1])


def test_packed_convolutions_can_be_targets():
    packed = load_base("tiny", "int8", vae=False)
    adapter = attached(packed, targets=["conv1", "downsamplers.0.conv"])
    assert {type(layer.base_layer) for layer in adapter.layers} == {Int8Conv2d}
    assert not torch.equal(predicted(packed), predicted(load_base("tiny", "int8", vae=False)))


OTHERS = ["conv1", "conv_shortcut", "downsamplers.0.conv", "ff.net.0.proj", "ff.net.2", "proj_in"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_layers_are_merged_and_exported_too(precision, tmp_path):
    there = load_base("tiny", precision, vae=False)
    adapter = attached(there, targets=OTHERS)
    apart = predicted(there)
    adapter.export(tmp_path)
    adapter.merge_()
    merged = predicted(there)
    error = (merged - apart).norm() / apart.norm()
    assert error < (1e-5 if precision == "fp32" else 0.03)
    again = LoRA()
    again.load_export(tmp_path)
    again.attach(load_base("tiny", precision, vae=False))
    theirs = load_base("tiny", precision, vae=False)
    again.attach(theirs)
    torch.testing.assert_close(predicted(theirs), apart)


def test_members_go_through_the_op_that_triton_answers(monkeypatch):
    """Its CPU body stands in for the kernel: the same members, the same answer."""
    there = load_base("tiny", "int8", vae=False)
    adapter = attached(there)
    members = RandomGradientEstimator(2, mu=0.05).around(step=3)
    with adapter.at(members):
        apart = predicted(there, members=3, apart=adapter.layers)
    calls = []
    op = lora_layers.perturbed_lora_linear
    monkeypatch.setattr(lora_layers, "runs_triton", lambda _: True)
    monkeypatch.setattr(lora_layers, "perturbed_lora_linear", lambda *given: calls.append(1) or op(*given))
    with adapter.at(members):
        fused = predicted(there, members=3, apart=adapter.layers)
    assert len(calls) == 80
    torch.testing.assert_close(fused, apart, rtol=1e-4, atol=1e-5)


def test_weights_that_wait_elsewhere_come_by_their_own_layers(monkeypatch):
    """As streamed ones do: what a layer's call brings is there for the op of many members neither before nor after."""
    there = load_base("tiny", "int8", vae=False)
    adapter = attached(there)
    members = RandomGradientEstimator(2, mu=0.05).around(step=3)
    with adapter.at(members):
        apart = predicted(there, members=3, apart=adapter.layers)
    monkeypatch.setattr(lora_layers, "runs_triton", lambda _: True)
    monkeypatch.setattr(lora_layers, "perturbed_lora_linear", lambda *_: pytest.fail("the weight is elsewhere"))
    for layer in adapter.layers:
        weight = layer.base_layer.weight
        layer.base_layer.weight = weight.to("meta")
        layer.base_layer.register_forward_pre_hook(lambda own, _, weight=weight: setattr(own, "weight", weight))
    with adapter.at(members):
        torch.testing.assert_close(predicted(there, members=3, apart=adapter.layers), apart)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_recomputed_activations_give_the_same_gradients(precision):
    found = []
    for checkpointing in (False, True):
        there = load_base("tiny", precision, vae=False)
        adapter = attached(there)
        predict_noise(there.unet, *inputs(there), checkpointing=checkpointing).square().sum().backward()
        found.append([theta.grad for theta in adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_lora_of_another_bases_widths_is_refused(base, tmp_path):
    """Of as many layers, whose outputs are as wide and whose inputs are not."""
    adapter = attached(base)
    with torch.no_grad():
        for name, down in adapter.down.items():
            if "attn2_to_k" in name:
                adapter.down[name] = nn.Parameter(torch.zeros(len(down), down.shape[1] + 8))
    with pytest.raises(UserError, match="of its targets or of other widths: use the base that it was trained on"):
        adapter.attach(base)
    adapter.detach()


def test_convolutions_and_feed_forward_layers_can_be_targets(base):
    adapter = attached(base, targets=["proj_in", "ff.net.2", "to_v", "time_embedding.linear_1"])
    kinds = {type(layer.base_layer) for layer in adapter.layers}
    assert kinds == {nn.Linear, nn.Conv2d}
    members = SPSAEstimator(1, mu=0.05).around(step=0)
    with adapter.at(members):
        together = predicted(base, members=2, apart=adapter.layers)
    with torch.no_grad():
        for param_id, theta in adapter.numbered().items():
            theta.copy_(members.of(theta.clone(), param_id)[1])
    torch.testing.assert_close(together[1:], predicted(base), rtol=1e-4, atol=1e-5)
    adapter.detach()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_gradients_are_those_of_the_written_out_product(precision):
    """Through int8 layers too, whose weight is dequantised again for the backward pass and never kept."""
    base = load_base("tiny", precision, vae=False)
    adapter = attached(base)
    latents, timestep, embeds = inputs(base)
    grads = torch.autograd.grad(
        predict_noise(base.unet, latents, timestep, embeds).square().sum(), list(adapter.numbered().values())
    )
    param_id = 7
    theta = adapter.numbered()[param_id]
    direction, h = torch.randn(theta.shape, generator=torch.Generator().manual_seed(3)), 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            theta.add_(sign * h * direction)
            values.append(predict_noise(base.unet, latents, timestep, embeds).double().square().sum())
            theta.sub_(sign * h * direction)
    assert (grads[param_id] * direction).sum() == pytest.approx(float(values[0] - values[1]) / (2 * h), rel=2e-2)


def test_the_backward_pass_keeps_no_dequantised_weight_and_no_copy_in_another_dtype():
    base = load_base("tiny", "int8", vae=False)
    attached(base)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        predict_noise(base.unet, *inputs(base))
    floats = {id(p) for p in base.unet.parameters()}
    largest = max(layer.weight.numel() for layer in base.unet.modules() if hasattr(layer, "weight_shape"))
    assert not any(x.is_floating_point() and id(x) not in floats and x.numel() == largest for x in kept)


def test_freezing_a_trains_b_alone_under_the_same_ids(base):
    both, half = LoRA(rank=4), LoRA(rank=4, freeze_down=True)
    both.attach(base)
    ids = {id: tuple(theta.shape) for id, theta in both.numbered().items()}
    half.attach(base)
    assert {id: tuple(theta.shape) for id, theta in half.numbered().items()} == {k: ids[k] for k in range(80, 160)}
    both.detach(), half.detach()


def test_what_is_frozen_is_not_moved(base):
    """Members then differ in B alone: noise in A would move losses that B's gradient is told from."""
    adapter = LoRA(rank=4, freeze_down=True)
    adapter.attach(base)
    members = SPSAEstimator(1, mu=0.05).around(step=0)
    with adapter.at(members):
        together = predicted(base, members=2, apart=adapter.layers)
    with torch.no_grad():
        for param_id, theta in adapter.numbered().items():
            theta.copy_(members.of(theta.clone(), param_id)[1])
    torch.testing.assert_close(together[1:], predicted(base), rtol=1e-4, atol=1e-5)
    adapter.detach()


def test_a_seed_draws_the_same_factors(base):
    drawn = []
    for seed in (0, 0, 1):
        adapter = LoRA(rank=4, seed=seed)
        torch.manual_seed(len(drawn))
        adapter.attach(base)
        drawn.append(adapter.down["mid_block_attentions_0_transformer_blocks_0_attn1_to_q"].detach().clone())
        adapter.detach()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_diffusers_loads_what_is_exported(base, tmp_path, alpha):
    adapter = attached(base, alpha=alpha)
    ours = predicted(base)
    paths = adapter.export(tmp_path)
    adapter.detach()
    assert [path.name for path in paths] == ["pytorch_lora_weights.safetensors", "lora_kohya.safetensors"]
    for path in paths:
        pipe = StableDiffusionPipeline(
            vae=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder=base.text_encoders[0],
            tokenizer=base.tokenizers[0],
            unet=load_base("tiny", vae=False).unet,
            scheduler=DDIMScheduler.from_config(base.scheduler.config),
        )
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
        with torch.no_grad():
            theirs = pipe.unet(*inputs(base)).sample
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_kohyas_keys_are_those_that_comfyui_and_a1111_look_for(base, tmp_path):
    adapter = attached(base)
    adapter.export(tmp_path)
    tensors = load_file(tmp_path / "lora_kohya.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {key for key in tensors if key.startswith(stem)} == {
        f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert len(tensors) == 3 * 80 and tensors[f"{stem}.alpha"] == 4
    adapter.detach()


@pytest.mark.parametrize(
    ("family", "version", "is_v2"),
    [("sd1", "sd_v1", "False"), ("sd2", "sd_v2", "True"), ("sdxl", "sdxl_base_v1-0", "False"), ("tiny", None, None)],
)
def test_a1111_is_told_the_family_without_which_it_hides_a_lora(base, tmp_path, family, version, is_v2):
    adapter = attached(base)
    adapter.family = family
    adapter.export(tmp_path)
    adapter.detach()
    with safe_open(tmp_path / "lora_kohya.safetensors", "pt") as file:
        told = file.metadata()
    assert (told.get("ss_base_model_version"), told.get("ss_v2")) == (version, is_v2)
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "4"
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert not any(key.startswith("ss_") for key in file.metadata())


def test_the_family_is_the_bases(base):
    adapter = attached(base)
    assert adapter.family == "tiny"
    adapter.detach()


def test_an_export_does_not_need_the_base(base, tmp_path):
    """Nor one that has left it, nor one that was read from files."""
    adapter = attached(base, alpha=2.0)
    adapter.export(tmp_path / "there")
    adapter.detach()
    adapter.export(tmp_path / "left")
    other = LoRA()
    other.load_export(tmp_path / "left")
    other.export(tmp_path / "read")
    first = load_file(tmp_path / "there" / "pytorch_lora_weights.safetensors")
    for folder in ("left", "read"):
        again = load_file(tmp_path / folder / "pytorch_lora_weights.safetensors")
        assert len(first) == 160 and first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_lora_that_met_no_base_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing to export, as the LoRA has not met a base yet: fit it"):
        LoRA(rank=4).export(tmp_path)
    assert not list(tmp_path.iterdir())


BLOCKS = {
    "sd15": {"down": {0: (2, 1), 1: (2, 1), 2: (2, 1)}, "mid": 1, "up": {1: (3, 1), 2: (3, 1), 3: (3, 1)}},
    "sdxl": {"down": {1: (2, 2), 2: (2, 10)}, "mid": 10, "up": {0: (3, 10), 1: (3, 2)}},
}
BLOCKS["sd21"] = BLOCKS["sd15"]
"""Of the published U-Nets: block -> (transformers, blocks in each), as kohya's files number them."""


@pytest.mark.parametrize("name", BLOCKS)
def test_every_key_is_one_that_kohyas_files_of_a_published_base_have(name):
    about = BLOCKS[name]
    places = [
        (f"{side}_blocks_{block}_attentions_{number}", depth)
        for side in ("down", "up")
        for block, (count, depth) in about[side].items()
        for number in range(count)
    ]
    places.append(("mid_block_attentions_0", about["mid"]))
    published = {
        f"lora_unet_{place}_transformer_blocks_{block}_{attention}_{layer}"
        for place, depth in places
        for block in range(depth)
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out_0")
    }
    unet = build_unet(architecture(name))
    assert {f"lora_unet_{undotted(key)}" for key in matching(unet, LoRA().targets, (), "targets")} == published
    assert len(published) == {"sd15": 128, "sd21": 128, "sdxl": 560}[name]


def test_an_export_is_read_back_with_its_origin(base, tmp_path):
    adapter = attached(base, token="zwx", alpha=2.0)
    ours = predicted(base)
    adapter.export(tmp_path)
    adapter.detach()
    other = LoRA()
    other.load_export(tmp_path)
    other.attach(base, "ball")
    assert other.token == "zwx" and other.rank == 4
    assert other.origin == {"base": "tiny", "precision": "fp32", "class_word": "ball"}
    torch.testing.assert_close(predicted(base), ours, rtol=1e-5, atol=1e-6)
    numbers = {id(theta): param_id for param_id, theta in other.numbered().items()}
    for layer in other.layers:  # which are perturbed by these, and updated by those
        assert layer.ids == tuple(numbers[id(factor)] for factor in layer.factors)
    other.detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_merging_with_a_scale_gives_the_same_pictures_without_layers_of_ours(precision):
    base = load_base("tiny", precision, vae=False)
    adapter = LoRA(rank=4)
    adapter.scale = 0.5
    adapter.attach(base)
    plain = predicted(base)
    with torch.no_grad():
        for up in adapter.up.values():
            up.normal_(std=0.2, generator=torch.Generator().manual_seed(up.numel()))
    apart = predicted(base)
    adapter.merge_()
    merged = predicted(base)
    adapter.detach()
    assert torch.equal(predicted(base), merged)
    moved = (apart.float() - plain.float()).norm()
    allowed = {"fp32": 1e-4, "bf16": 0.2, "int8": 0.1}[precision]
    assert (merged.float() - apart.float()).norm() < allowed * moved


@pytest.mark.skipif(bool(why_not_int4()), reason=str(why_not_int4()))
def test_a_lora_is_not_merged_into_int4_where_it_would_drown():
    base = load_base("tiny", "int4", vae=False)
    with pytest.raises(UserError, match="cannot be merged into int4 weights"):
        attached(base).merge_()


def test_without_the_lora_the_base_is_as_it_was(base):
    plain = predicted(base)
    adapter = attached(base)
    assert not torch.equal(predicted(base), plain)
    with adapter.away():
        assert torch.equal(predicted(base), plain)
    adapter.detach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "LoRA.rank is 0; use 1, 2, ..., or auto"),
        ({"alpha": -1.0}, "LoRA.alpha is -1.0; use a number above 0, or null"),
        ({"targets": []}, r"LoRA.targets is \[\]; use at least one"),
        ({"token": " "}, "LoRA.token is  ; use a word, such as sks"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


def test_a_target_that_matches_nothing_is_named_with_those_there_are(base):
    with pytest.raises(UserError, match="'to_w' is the name of no layer there.*to_k, .*to_q"):
        LoRA(rank=4, targets=["to_q", "to_w"]).attach(base)


def test_what_was_trained_on_other_layers_is_refused(base):
    adapter = LoRA(rank=4)
    adapter.attach(base)
    adapter.detach()
    adapter.targets = ["to_q"]
    with pytest.raises(UserError, match="the LoRA has 80 layers, and tiny 20 of its targets"):
        adapter.attach(base)
    adapter.detach()


@pytest.mark.parametrize("damage", ["cut", "nan", "missing", "other"])
def test_a_damaged_export_is_one_sentence(base, tmp_path, damage):
    from safetensors.torch import save_file

    adapter = attached(base)
    (path, _) = adapter.export(tmp_path)
    adapter.detach()
    tensors = load_file(path)
    first = next(iter(tensors))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "nan":
        save_file(tensors | {first: tensors[first] * float("nan")}, path)
    elif damage == "missing":
        save_file({key: value for key, value in tensors.items() if key != first}, path)
    else:
        save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=str(path)):
        LoRA().load_export(tmp_path)


def test_here_is_one_member_that_gradients_reach():
    theta = nn.Parameter(torch.ones(3))
    assert len(HERE) == 1 and HERE.is_here
    assert torch.autograd.grad(HERE.of(theta).sum(), theta)[0].tolist() == [1.0, 1.0, 1.0]
    assert not Members(((0, 1.0),), 0.1).is_here
