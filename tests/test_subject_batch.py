"""Subjects in one batch learn what they would learn alone."""

import re
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch import Callback
from safetensors.torch import load_file

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.bases import encode_prompts
from mep_lightning.callbacks import PUTS, Samples
from mep_lightning.checkpoint import merge, split
from mep_lightning.errors import CheckpointError, UserError
from mep_lightning.estimators import (
    ConditioningSubspace,
    ForwardGradientEstimator,
    RandomGradientEstimator,
    SubspaceGradient,
)
from mep_lightning.subject_batch import SubjectBatch, SubjectBatchData
from mep_lightning.tiny import BASE
from mep_lightning.tiny.subjects import subject
from tests.personalizing import StopAt

WAYS = {
    "zoodip": dict(estimator=RandomGradientEstimator(n=2, mu=1e-3), subspace=SubspaceGradient(tau=2, nu=0.1)),
    "fast": dict(estimator=RandomGradientEstimator(n=2, mu=1e-3), subspace=ConditioningSubspace()),
    "tangents": dict(estimator=ForwardGradientEstimator(n=2)),
    "backprop": dict(),
    "backprop, projected": dict(subspace=SubspaceGradient(tau=2, nu=0.1)),
    "standardized": dict(estimator=RandomGradientEstimator(n=3, mu=1e-3, normalize=True, standardize=True)),
}


@pytest.fixture
def folders(tmp_path):
    """Photos of three subjects, by class word."""
    found = {}
    for index in range(3):
        one = subject(index)
        folder = tmp_path / one.name
        folder.mkdir()
        for i, photo in enumerate(one.photos()):
            photo.save(folder / f"{i}.png")
        found[one.class_word] = folder
    return found


def data_of(folders, **settings):
    return {word: SubjectData(folder, class_word=word, **settings) for word, folder in folders.items()}


def module_of(number, way="zoodip", **settings):
    settings = {"precision": "int8", "seed": number, "lr": 1e-2, **WAYS[way], **settings}
    return PersonalizationModule(adapter=TokenEmbedding(init="ball"), **settings)


def trainer_of(root, steps, **settings):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(max_steps=steps, accelerator="cpu", default_root_dir=root, **quiet, **settings)


def together(folders, root, way, steps=4, checkpoint=None, **settings):
    module = SubjectBatch([module_of(i, way, **settings) for i in range(len(folders))])
    trainer = trainer_of(root, steps, enable_checkpointing=False)
    trainer.fit(module, SubjectBatchData(data_of(folders)), ckpt_path=checkpoint, weights_only=True)
    return module, trainer


def tokens_of(module):
    return [one.adapter.theta.detach().clone() for one in module.each]


@pytest.mark.parametrize("way", WAYS)
def test_each_learns_what_it_would_learn_alone(way, folders, tmp_path):
    are_what_they_are_alone(folders, tmp_path, way)


def test_members_may_take_turns(folders, tmp_path):
    rows = []

    class Counted(Callback):
        def on_train_start(self, trainer, module):
            unet = module.first.base.unet
            unet.conv_out.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    five = dict(estimator=RandomGradientEstimator(n=4, mu=1e-3, standardize=True))
    batch = SubjectBatch([module_of(i, "standardized", members_at_once=3, **five) for i in range(3)])
    trainer_of(tmp_path, 4, enable_checkpointing=False, callbacks=[Counted()]).fit(
        batch, SubjectBatchData(data_of(folders))
    )
    assert rows == [3 * 3, 3 * 3] * 4  # five members of three subjects, and one of them again
    whole, _ = together(folders, tmp_path, "standardized", **five)
    start = module_of(0)
    start.load()
    for apart, beside in zip(tokens_of(batch), tokens_of(whole), strict=True):
        moved = (beside - start.adapter.theta.detach()).norm()
        assert moved > 0.01 and (apart - beside).norm() <= 0.02 * moved


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_so_it_does_where_velocities_are_predicted_or_two_encoders_read(kind, folders, tmp_path, made_single_files):
    """Backpropagation, in fp32: differences of losses would be those of random weights, mostly rounding."""
    are_what_they_are_alone(folders, tmp_path, "backprop", base=str(made_single_files / kind), precision="fp32")


def are_what_they_are_alone(folders, root, way, **settings):
    module, _ = together(folders, root, way, **settings)
    batched = [parts_of(one) for one in module.each]
    number, (word, folder) = 1, list(folders.items())[1]
    alone = module_of(number, way, **settings)
    trainer_of(root, 4, enable_checkpointing=False).fit(alone, SubjectData(folder, class_word=word))
    start = module_of(number, way, **settings)
    start.load()
    rounding = 0.02 if isinstance(alone.estimator, RandomGradientEstimator) else 1e-3  # a difference's is larger
    for i, (before, after) in enumerate(zip(parts_of(start), parts_of(alone), strict=True)):
        moved = (after - before).norm()
        assert moved > 0.01
        assert (after - batched[number][i]).norm() <= rounding * moved
        assert (batched[0][i] - batched[1][i]).norm() > 0.01


def parts_of(module):
    """Vectors of each of the text encoders."""
    return [theta.detach().clone() for theta in module.adapter.parameters()]


def test_photos_of_a_batch_stay_with_their_subject(folders, tmp_path):
    """Two photos a step, at a learning rate that falls."""
    settings = {"estimator": RandomGradientEstimator(n=2, mu=1e-3), "subspace": None, "lr_scheduler": "linear"}
    module = SubjectBatch([module_of(i, **settings) for i in range(3)])
    trainer_of(tmp_path, 4, enable_checkpointing=False).fit(module, SubjectBatchData(data_of(folders, batch_size=2)))
    word, folder = list(folders.items())[1]
    alone = module_of(1, **settings)
    data = SubjectData(folder, class_word=word, batch_size=2)
    trainer_of(tmp_path, 4, enable_checkpointing=False).fit(alone, data)
    start = module_of(1)
    start.load()
    moved = (alone.adapter.theta - start.adapter.theta).norm()
    assert moved > 0.01
    assert (alone.adapter.theta - module.each[1].adapter.theta).norm() <= 0.02 * moved


class Spoilt(Callback):
    """Makes the first subject's latents useless."""

    def on_train_start(self, trainer, pl_module):
        data = next(iter(trainer.datamodule.subjects.values()))
        data.latents = {size: (mean * float("nan"), std) for size, (mean, std) in data.latents.items()}


@pytest.mark.parametrize("way", ["zoodip", "backprop"])
def test_a_subject_whose_loss_is_not_finite_is_skipped_alone(way, folders, tmp_path):
    module = SubjectBatch([module_of(i, way) for i in range(3)])
    trainer = trainer_of(tmp_path, 4, enable_checkpointing=False, callbacks=[Spoilt()])
    with pytest.warns(UserWarning, match="step 0 was skipped"):
        trainer.fit(module, SubjectBatchData(data_of(folders)))
    whole, _ = together(folders, tmp_path, way)
    start = module_of(0, way)
    start.load()
    assert [one.skipped.total for one in module.each] == [4, 0, 0]
    spoilt, *others = tokens_of(module)
    assert torch.equal(spoilt, start.adapter.theta)
    for mine, theirs in zip(others, tokens_of(whole)[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_batches_that_do_not_go_together_are_refused(folders, tmp_path):
    data = data_of(folders)
    data[next(iter(data))].batch_size = 2
    module = SubjectBatch([module_of(i) for i in range(3)])
    with pytest.raises(UserError, match="the same batch_size and resolution"):
        trainer_of(tmp_path, 1, enable_checkpointing=False).fit(module, SubjectBatchData(data))
    (one, *_) = data.values()
    with pytest.raises(UserError, match="the same SubjectData twice"):
        SubjectBatchData({"a": one, "b": one})


def test_a_trainer_that_cannot_train_it_is_refused(folders, tmp_path):
    module, data = SubjectBatch([module_of(i) for i in range(3)]), SubjectBatchData(data_of(folders))
    endless = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="never ends: give the Trainer max_steps"):
        endless.fit(module, data)
    drawing = trainer_of(tmp_path, 1, enable_checkpointing=False, callbacks=[Samples()])
    with pytest.raises(UserError, match="SubjectBatch has none: leave it out"):
        drawing.fit(module, data)


def test_puts_says_which_timesteps_all_of_them_draw(folders, tmp_path):
    module = SubjectBatch([module_of(i) for i in range(3)])
    trainer = trainer_of(tmp_path, 1, enable_checkpointing=False, callbacks=[PUTS(low=600, high=700)])
    trainer.fit(module, SubjectBatchData(data_of(folders)))
    for one in module.each:
        assert 600 <= int(one.draw(one.photos.batch(0)).timestep) < 700


def test_the_examples_in_the_documents_run(folders, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    for name, photos in zip(("rex", "tom"), folders.values(), strict=False):
        (tmp_path / "photos").mkdir(exist_ok=True)
        photos.rename(tmp_path / "photos" / name)
    exec(compile(code.replace("6_000", "1"), "docs/scaling.md", "exec"), {})
    assert len(list((tmp_path / "tokens").rglob("*.safetensors"))) == 2
    tom = torch.load("tom.ckpt", weights_only=True)
    assert torch.equal(tom["state_dict"]["adapter.theta"], load_file("tokens/tom/learned_embeds.safetensors")["<sks>"])
    assert [one["class_word"] for one in torch.load("tom-and-rex.ckpt", weights_only=True)["mep"]["subjects"]] == [
        *("cube", "ball")
    ]


def test_more_subjects_than_have_a_launch_each(folders, tmp_path):
    """Directions of different subjects go by the same number, and must not be taken for one another's."""
    photos = {f"{word}-{i}": SubjectData(folder, class_word=word) for i in (0, 1) for word, folder in folders.items()}
    for way in ("zoodip", "fast"):
        module = SubjectBatch([module_of(i, way) for i in range(6)])
        trainer_of(tmp_path, 3, enable_checkpointing=False).fit(module, SubjectBatchData(photos))
        alone = module_of(5, way)
        trainer_of(tmp_path, 3, enable_checkpointing=False).fit(alone, list(photos.values())[5])
        start = module_of(5, way)
        start.load()
        moved = (alone.adapter.theta - start.adapter.theta).norm()
        assert moved > 0.01
        assert (alone.adapter.theta - module.each[5].adapter.theta).norm() <= 0.02 * moved


@pytest.mark.parametrize("way", ["zoodip", "backprop"])
def test_a_resumed_batch_goes_on_bit_by_bit(way, folders, tmp_path):
    whole, _ = together(folders, tmp_path, way, steps=5)
    _, trainer = together(folders, tmp_path, way, steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = together(folders, tmp_path, way, steps=5, checkpoint=tmp_path / "last.ckpt")
    for one, other in zip(tokens_of(whole), tokens_of(resumed), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="not one of 1 subjects"):
        together(dict(list(folders.items())[:1]), tmp_path, way, steps=6, checkpoint=tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="trained with lr"):
        together(folders, tmp_path, way, steps=6, checkpoint=tmp_path / "last.ckpt", lr=0.5)


def test_any_subject_goes_on_alone_or_beside_others(folders, tmp_path):
    """From its own part of a checkpoint, which is what one of its own would be."""

    def fitted(module, data, checkpoint=None, stop=5):
        trainer = trainer_of(tmp_path, 5, enable_checkpointing=False, callbacks=[StopAt(stop)])
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return trainer

    def made(number):
        word, folder = list(folders.items())[number]
        return module_of(number, lr_scheduler="linear"), SubjectData(folder, class_word=word)

    def several(numbers, checkpoint=None, stop=5):
        modules, data = zip(*map(made, numbers), strict=True)
        batch = SubjectBatch(modules)
        return batch, fitted(batch, SubjectBatchData({str(i): one for i, one in enumerate(data)}), checkpoint, stop)

    whole = tokens_of(several(range(3))[0])
    several(range(3), stop=3)[1].save_checkpoint(tmp_path / "three.ckpt")
    together = torch.load(tmp_path / "three.ckpt", weights_only=True)
    parts = split(together)
    fitted(*made(1), stop=3).save_checkpoint(tmp_path / "own.ckpt")
    own = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert shape_of(parts[1]) == shape_of(own)

    start, _ = made(1)
    start.load()
    near = 0.02 * (whole[1] - start.adapter.theta).norm()
    assert near > 1e-4
    torch.save(parts[1], tmp_path / "one.ckpt")
    alone, data = made(1)
    fitted(alone, data, tmp_path / "one.ckpt")
    assert (alone.adapter.theta - whole[1]).norm() <= near
    torch.save(merge([parts[2], own]), tmp_path / "two.ckpt")  # in another order, one from elsewhere, one left out
    last, middle = tokens_of(several([2, 1], tmp_path / "two.ckpt")[0])
    assert (last - whole[2]).norm() <= near and (middle - whole[1]).norm() <= near
    assert flat(merge(parts)) == flat(together)
    with pytest.raises(CheckpointError, match="subjects at steps 3 and 4 cannot go on together"):
        merge([own, own | {"global_step": 4}])


def flat(node, name=""):
    """Every value by its place, in a form that can be compared."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else None
    if children is None:
        return {name: node.tolist() if isinstance(node, torch.Tensor) else node}
    return {place: value for key, child in children for place, value in flat(child, f"{name}.{key}").items()}


def shape_of(checkpoint):
    """What is where in a checkpoint, and of what kind; what it comes to is rounded otherwise."""
    values = flat(checkpoint)
    return {name: (type(value), len(value) if isinstance(value, list) else None) for name, value in values.items()}


def test_every_subject_is_exported_by_its_name(folders, tmp_path):
    module, _ = together(folders, tmp_path, "zoodip", steps=1)
    written = module.export(tmp_path / "out")
    assert list(written) == list(folders)
    for word, one in zip(folders, module.each, strict=True):
        (path,) = written[word]
        assert path == tmp_path / "out" / word / "learned_embeds.safetensors"
        assert torch.equal(load_file(path)["<sks>"], one.adapter.theta)
        assert one.adapter.origin["class_word"] == word


def test_a_step_is_one_forward_pass(folders, tmp_path, monkeypatch):
    module = SubjectBatch([module_of(i) for i in range(3)])
    rows = []
    trainer = trainer_of(tmp_path, 2, enable_checkpointing=False)
    data = SubjectBatchData(data_of(folders))

    def count(unet, args):
        rows.append(len(args[0]))

    module.first.load().unet.conv_out.register_forward_pre_hook(count)
    trainer.fit(module, data)
    assert rows == [9, 9]  # three members of three subjects


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([], "no subject"),
        ([module_of(0), module_of(1, lr=1.0)], "differ in lr"),
        ([module_of(0), module_of(1, "fast")], "differ in method, estimator or subspace"),
        ([PersonalizationModule(adapter=LoRA(rank=2))], "adapter is LoRA"),
    ],
    ids=["none", "lr", "subspace", "lora"],
)
def test_what_cannot_share_a_batch_is_refused(others, sentence):
    with pytest.raises(UserError, match=sentence):
        SubjectBatch(others)


def test_data_of_another_number_of_subjects_are_refused(folders, tmp_path):
    module = SubjectBatch([module_of(0), module_of(1)])
    with pytest.raises(UserError, match="SubjectBatch of 2 subjects is fitted with SubjectBatchData of as many"):
        trainer_of(tmp_path, 1, enable_checkpointing=False).fit(module, SubjectBatchData(data_of(folders)))
    with pytest.raises(UserError, match="no subject"):
        SubjectBatchData({})


def test_concepts_of_one_run_go_into_one_prompt(folders, tmp_path):
    """Each under a name of its own, in diffusers' pipeline and here alike."""
    from diffusers import StableDiffusionPipeline

    folders = dict(list(folders.items())[:2])
    names = ("<rex>", "<tom>")
    modules = [
        PersonalizationModule(adapter=TokenEmbedding(name, init="ball"), precision="fp32", lr=1e-2, seed=number)
        for number, name in enumerate(names)
    ]
    batch = SubjectBatch(modules)
    trainer_of(tmp_path, 2).fit(batch, SubjectBatchData(data_of(folders)))
    batch.export(tmp_path / "tokens")
    pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
    for word, name in zip(folders, names, strict=True):
        (path,) = (tmp_path / "tokens" / word).iterdir()
        assert list(load_file(path)) == [name]
        pipe.load_textual_inversion(str(path))
    prompt = "a <rex> beside a <tom>"
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    with torch.no_grad():
        both = {name: value for one in modules for name, value in one.adapter.tokens().items()}
        ours = encode_prompts(modules[0].loaded(), [prompt], both)
        for name in names:
            alone = encode_prompts(modules[0].loaded(), [prompt], both | {name: torch.zeros_like(both[name])})
            assert not torch.equal(ours, alone)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_checkpoint_whose_moments_are_of_another_shape_is_refused(folders, tmp_path):
    _, trainer = together(folders, tmp_path, "zoodip", steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    kept = torch.load(tmp_path / "half.ckpt", weights_only=True)
    kept["optimizer_states"][0]["state"][1]["exp_avg"] = torch.zeros(3)
    torch.save(kept, tmp_path / "half.ckpt")
    with pytest.raises(CheckpointError, match="a exp_avg of another shape"):
        together(folders, tmp_path, "zoodip", steps=4, checkpoint=tmp_path / "half.ckpt")
