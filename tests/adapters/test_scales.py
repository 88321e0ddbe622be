"""Quantisation scales: what is trained is W = s_out q s_in's s, and nothing else moves."""

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, QuantizationScales
from mep_lightning.bases import load_base, predict_noise
from mep_lightning.errors import UserError
from mep_lightning.estimators import ForwardGradientEstimator, RandomGradientEstimator, SPSAEstimator
from mep_lightning.estimators.perturbation import HERE, direction
from mep_lightning.quantization import Int8Conv2d, Int8Linear, integer_products
from tests.bases.test_streaming import Poisoned
from tests.personalizing import fitted

BOTH = pytest.mark.parametrize("both", [False, True], ids=["output", "output and input"])


@pytest.fixture
def base():
    return load_base("tiny", "int8", vae=False)


def layers_of(base):
    return {name: part for name, part in base.unet.named_modules() if isinstance(part, (Int8Linear, Int8Conv2d))}


def moved(adapter, by=0.1, seed=0):
    """Scales that have left their places."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for theta in adapter.numbered().values():
            theta.mul_(1 + by * torch.rand(theta.shape, generator=generator))
    return adapter


def inputs(batch=1):
    g = torch.Generator().manual_seed(0)
    times = torch.tensor([400, 90, 700][:batch])
    return torch.randn(batch, 4, 16, 16, generator=g), times, torch.randn(batch, 77, 128, generator=g)


def predicted(base):
    with torch.no_grad():
        return base.unet(*inputs()).sample


def written_out(base, tensors):
    """The same U-Net in floating point, each weight s_out q s_in."""
    plain = load_base("tiny", vae=False).unet
    for name, layer in layers_of(base).items():
        weight = layer.weight.float()
        rest = (1,) * (weight.dim() - 2)
        weight = weight * tensors[f"{name}.scale"].view(-1, 1, *rest)
        if f"{name}.input_scale" in tensors:
            weight = weight * tensors[f"{name}.input_scale"].view(1, -1, *rest)
        plain.get_submodule(name).weight.data = weight
    return plain


@BOTH
def test_starts_as_the_base_and_leaves_it_as_it_was(base, both):
    before = predicted(base)
    adapter = QuantizationScales(input_channels=both)
    adapter.attach(base)
    torch.testing.assert_close(predicted(base), before, rtol=0, atol=0)
    moved(adapter)
    assert (predicted(base) - before).abs().max() > 1e-2
    with adapter.away():
        assert torch.equal(predicted(base), before)
    adapter.detach()
    assert torch.equal(predicted(base), before)
    assert all(type(layer) in (Int8Linear, Int8Conv2d) for layer in layers_of(base).values())


@BOTH
def test_computes_with_the_weight_written_out(base, tmp_path, both):
    adapter = QuantizationScales(input_channels=both)
    adapter.attach(base)
    (path,) = moved(adapter).export(tmp_path)
    plain = written_out(base, load_file(path))
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs()).sample, predicted(base), rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_weight_written_out(base, tmp_path, both, checkpointing):
    adapter = QuantizationScales(input_channels=both)
    adapter.attach(base)
    (path,) = moved(adapter).export(tmp_path)
    tensors = {key: value.requires_grad_() for key, value in load_file(path).items()}
    plain = load_base("tiny", vae=False).unet
    weights = {}
    for name, layer in layers_of(base).items():
        rest = (1,) * (layer.weight.dim() - 2)
        weight = layer.weight.float() * tensors[f"{name}.scale"].view(-1, 1, *rest)
        weights[f"{name}.weight"] = weight * tensors[f"{name}.input_scale"].view(1, -1, *rest) if both else weight
    expected = torch.func.functional_call(plain, weights, inputs()).sample.square().sum()
    theirs = torch.autograd.grad(expected, list(tensors.values()))
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    base.unet(*inputs()).sample.square().sum().backward()
    for key, other in zip(tensors, theirs, strict=True):
        name, _, kind = key.rpartition(".")
        part = adapter.output if kind == "scale" else adapter.input
        torch.testing.assert_close(part[name.replace(".", "_")].grad, other, rtol=2e-3, atol=2e-3 * other.abs().max())


def test_an_input_is_kept_once_for_both_of_its_gradients(base):
    def kept(both):
        adapter = QuantizationScales(input_channels=both)
        adapter.attach(base)
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = base.unet(*inputs()).sample.square().sum()
        adapter.detach()
        return sum(sizes.values()), loss

    (one, _), (two, _) = kept(False), kept(True)
    assert two < 1.1 * one


@BOTH
@pytest.mark.parametrize("estimator", [RandomGradientEstimator, SPSAEstimator])
def test_members_computed_together_are_those_computed_alone(base, both, estimator):
    adapter = QuantizationScales(input_channels=both)
    adapter.attach(base)
    members = estimator(n=2, mu=1e-4, seed=0).around(0)
    with torch.no_grad():
        rows = [value.repeat(len(members), *(1,) * (value.dim() - 1)) for value in inputs(2)]
        with adapter.at(members):
            together = base.unet(*rows).sample.chunk(len(members))
        starts = {param_id: theta.clone() for param_id, theta in adapter.numbered().items()}
        for index, found in enumerate(together):
            for param_id, theta in adapter.numbered().items():
                theta.copy_(members.of(starts[param_id], param_id)[index])
            torch.testing.assert_close(base.unet(*inputs(2)).sample, found, rtol=1e-3, atol=1e-3)
            for param_id, theta in adapter.numbered().items():
                theta.copy_(starts[param_id])
    assert (together[0] - together[1]).abs().max() > 1e-3


@BOTH
def test_forward_gradients_are_exact_along_their_directions(both):
    module = PersonalizationModule(
        "tiny",
        "int8",
        adapter=QuantizationScales(input_channels=both),
        estimator=ForwardGradientEstimator(n=2, seed=0),
        method="peqa",
    )
    module.class_word = "ball"
    module.load()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    draw = module.draw({"mean": latents, "std": torch.zeros_like(latents), "prompts": ["a photo of {}"]})
    trained = module.adapter.numbered()
    weights, _ = module.estimator.weigh(lambda members: module.losses(members, draw), 1, 0, trained)
    module.losses(HERE, draw).sum().backward()
    exact = [sum((direction(t, 0, 0, i, k) * t.grad).sum() for k, t in trained.items()) for i in range(2)]
    torch.testing.assert_close(2 * weights, torch.stack(exact), rtol=1e-3, atol=1e-4)


def test_integer_products_multiply_with_the_trained_scales(base):
    adapter = QuantizationScales()
    adapter.attach(base)
    moved(adapter)
    plain = predicted(base)
    with integer_products():
        rounded = predicted(base)
    assert not torch.equal(plain, rounded) and (plain - rounded).norm() < 0.1 * plain.norm()


@BOTH
def test_streamed_weights_give_the_same_gradients(both):
    found = []
    for streams in (False, True):
        base = load_base("tiny", "int8", vae=False)
        if streams:
            Poisoned(base.unet, torch.device("cpu"))
        adapter = QuantizationScales(input_channels=both)
        adapter.attach(base)
        moved(adapter)
        for _ in range(2):  # the second pass finds its weights fetched ahead
            adapter.zero_grad()
            predict_noise(base.unet, *inputs(), checkpointing=True).square().sum().backward()
        found.append([theta.grad for theta in adapter.numbered().values()])
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


@BOTH
def test_a_run_trains_every_scale_and_no_integer(tmp_path, both):
    method = "tuneqdm" if both else "peqa"
    mod = PersonalizationModule("tiny", "int8", adapter=QuantizationScales(input_channels=both), method=method)
    mod, run = fitted(3, tmp_path, mod)
    plain = load_base("tiny", "int8", vae=False)
    for name, layer in layers_of(mod.base).items():
        own = plain.unet.get_submodule(name)
        assert torch.equal(layer.weight, own.weight) and torch.equal(layer.scale, own.scale)
        key = name.replace(".", "_")
        assert not torch.equal(mod.adapter.output[key], own.scale)
        assert not both or not torch.equal(mod.adapter.input[key], torch.ones_like(mod.adapter.input[key]))
    assert run.global_step == 3
    assert all(name.startswith("adapter.") for name in mod.state_dict())


@BOTH
def test_a_resumed_run_is_bitwise_the_same(tmp_path, both):
    def made():
        return PersonalizationModule("tiny", "int8", adapter=QuantizationScales(input_channels=both), method="peqa")

    whole, _ = fitted(4, tmp_path, made())
    _, run = fitted(2, tmp_path, made())
    run.save_checkpoint(tmp_path / "two.ckpt")
    resumed = made()
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    Trainer(max_steps=4, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(
        resumed, SubjectData(seed=0), ckpt_path=tmp_path / "two.ckpt", weights_only=True
    )
    for mine, other in zip(resumed.adapter.parameters(), whole.adapter.parameters(), strict=True):
        assert torch.equal(mine, other)


@BOTH
def test_an_export_is_put_back_onto_a_fresh_base(base, tmp_path, both):
    adapter = QuantizationScales("zwx", input_channels=both)
    adapter.attach(base, "ball")
    (path,) = moved(adapter).export(tmp_path)
    assert path == tmp_path / "scales.safetensors"
    expected = predicted(base)
    fresh, again = load_base("tiny", "int8", vae=False), QuantizationScales()
    again.load_export(tmp_path)
    again.attach(fresh)
    assert again.token == "zwx" and again.origin["precision"] == "int8"
    assert torch.equal(predicted(fresh), expected)
    numbers = {id(theta): param_id for param_id, theta in again.numbered().items()}
    for layer in again.layers:  # which are perturbed by these, and updated by those
        scales = layer.scales
        mine = [scales.output, scales.input] if both else [scales.output]
        assert [numbers[id(theta)] for theta in mine] == list(scales.ids)[: len(mine)]


@pytest.mark.parametrize("both", [False, True])
def test_an_export_does_not_need_the_base(base, tmp_path, both):
    """Nor one that has left it, nor one that was read from files."""
    adapter = QuantizationScales(input_channels=both)
    adapter.attach(base)
    (there,) = moved(adapter).export(tmp_path / "there")
    adapter.detach()
    (left,) = adapter.export(tmp_path / "left")
    other = QuantizationScales()
    other.load_export(tmp_path / "left")
    (read,) = other.export(tmp_path / "read")
    first = load_file(there)
    for path in (left, read):
        again = load_file(path)
        assert len(first) > 0 and first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_scales_that_met_no_base_write_nothing(tmp_path):
    with pytest.raises(UserError, match="nothing to export, as the QuantizationScales has not met a base yet: fit it"):
        QuantizationScales().export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_adapter_takes_the_layers_over(base):
    before = predicted(base)
    scales, lora = moved(QuantizationScales()), LoRA(rank=2)
    scales.attach(base)
    moved(scales)
    lora.attach(base)
    assert torch.equal(predicted(base), before)
    again = QuantizationScales()
    again.attach(base)
    assert torch.equal(predicted(base), before) and not lora.layers


def test_some_layers_alone_can_be_targets(base):
    adapter = QuantizationScales(targets=["to_q", "conv1"])
    adapter.attach(base)
    assert all(name.endswith(("to_q", "conv1")) for name in adapter.output)
    with pytest.raises(UserError, match="QuantizationScales.targets: 'to_x' is the name of no layer there"):
        QuantizationScales(targets=["to_x"]).attach(base)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_other_weights_than_int8_are_refused(precision):
    with pytest.raises(UserError, match=f"those of int8 weights, and these are {precision}: take precision int8"):
        QuantizationScales().attach(load_base("tiny", precision, vae=False))


def test_scales_of_another_unet_are_refused(base, tmp_path):
    adapter = QuantizationScales()
    adapter.attach(base)
    (path,) = adapter.export(tmp_path)
    tensors = load_file(path)
    save_file({key: value[:-1] for key, value in tensors.items()}, path, {"mep.token": "sks"})
    other = QuantizationScales()
    other.load_export(tmp_path)
    with pytest.raises(UserError, match="of other widths: use the base that they were trained on"):
        other.attach(load_base("tiny", "int8", vae=False))


@pytest.mark.parametrize("damage", ["nan", "other", "half"])
def test_a_damaged_export_is_one_sentence(base, tmp_path, damage):
    adapter = QuantizationScales(input_channels=True)
    adapter.attach(base)
    (path,) = adapter.export(tmp_path)
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors |= {"nan": {first: tensors[first] * float("nan")}, "other": {"weight": torch.ones(3)}, "half": {}}[damage]
    if damage == "half":
        del tensors["conv_in.input_scale"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"scales.safetensors holds"):
        QuantizationScales().load_export(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"), [({"token": " "}, "token is  ; use a word"), ({"targets": []}, r"targets is \[\]")]
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        QuantizationScales(**settings)
