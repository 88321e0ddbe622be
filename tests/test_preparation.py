"""What a module is told of its data before the base comes: of SubjectData, and of data of the user's own."""

import pytest
import torch
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader

from mep_lightning import PersonalizationModule, SubjectData, advice
from mep_lightning.adapters import LoRA, TokenEmbedding
from mep_lightning.bases import Base
from mep_lightning.errors import UserError
from mep_lightning.estimators import Backprop
from mep_lightning.evaluation import generate
from mep_lightning.selection import TimestepAwareSelector
from tests.personalizing import module, trainer


class Photos(LightningDataModule):
    """Data of the user's own: latents and prompts, and nothing of what `SubjectData` knows."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        mean, std = torch.randn(2, 4, 4, 16, 16, generator=generator)
        rows = [{"mean": m, "std": 0.1 * s.abs(), "prompts": "a photo of a {}"} for m, s in zip(mean, std, strict=True)]
        return DataLoader(rows, batch_size=2)


def test_a_data_module_of_the_users_own_is_trained_on_and_left_as_it_is(tmp_path):
    data, mod = Photos(), module("backprop")
    before = set(vars(data))
    trainer(2, tmp_path, max_epochs=1).fit(mod, data)
    assert mod.global_step == 2 and set(vars(data)) == before
    again = module("backprop")
    trainer(2, tmp_path, max_epochs=1).fit(again, data.train_dataloader())
    assert torch.equal(mod.adapter.theta, again.adapter.theta)


def test_a_second_fits_captions_are_embedded_once_too(tmp_path, monkeypatch):
    """And not anew in every step, with text encoders that come and go."""
    mod = PersonalizationModule(adapter=LoRA(rank=2), lr=1e-3, method="lora")
    trainer(1, tmp_path).fit(mod, SubjectData(class_word="ball"))
    borrowed, borrow = [], Base.borrowed_text_encoders
    monkeypatch.setattr(Base, "borrowed_text_encoders", lambda base: borrowed.append(base) or borrow(base))
    trainer(4, tmp_path).fit(mod, SubjectData(class_word="red ball"))
    assert mod.global_step == 4 and len(borrowed) == 1


def test_a_class_word_may_be_cut_where_all_vectors_are_there(tiny_base):
    mod = module(vectors=3)
    mod.take(tiny_base)
    advice.refuse_cut_subjects(mod, ["a " * 27 + "<sks> ball", "<sks>, " + "a " * 40 + "<sks>", "no <sks>y word " * 20])
    with pytest.raises(UserError, match="names <sks> beyond the 32 tokens"):
        advice.refuse_cut_subjects(mod, ["a " * 28 + "<sks> ball"])


class Wrapped(LightningDataModule):
    """A data module of the user's own around photos that it does not hold itself."""

    def __init__(self):
        super().__init__()
        self.inner = SubjectData(class_word="ball")

    def __getattr__(self, name):
        if name in ("encode", "resolution", "texts", "class_word"):
            return getattr(self.inner, name)
        raise AttributeError(name)

    def train_dataloader(self):
        return self.inner.train_dataloader()


def test_data_that_encode_as_subject_data_do_are_told_to(tmp_path):
    mod = PersonalizationModule(adapter=LoRA(rank=2), lr=1e-3, method="lora")
    data = Wrapped()
    trainer(2, tmp_path).fit(mod, data)
    assert mod.global_step == 2 and data.token == "sks"


def test_a_selector_wants_data_that_know_two_resolutions(tmp_path):
    mod = PersonalizationModule(adapter=LoRA(rank=2), selector=TimestepAwareSelector(), lr=1e-3, low_resolution=32)
    for data in (Photos(), Photos().train_dataloader()):
        with pytest.raises(UserError, match="model.selector trains at two resolutions, at both of which SubjectData"):
            trainer(2, tmp_path).fit(mod, data)


@pytest.mark.parametrize("adapter", [LoRA(rank=2), TokenEmbedding(init="ball")], ids=["lora", "token"])
def test_a_caption_that_loses_its_subject_is_refused_before_the_first_step(tmp_path, adapter):
    """Beyond what the text encoder reads nobody would learn of it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64), "red").save(photos / "a.png")
    far = "a very long caption of a beach with " + "sand and water and sky and " * 6 + "a ball"
    (photos / "a.txt").write_text(far)
    mod = PersonalizationModule(adapter=adapter, estimator=Backprop(), lr=1e-3, method="lora")
    data = SubjectData(path=str(photos), class_word="ball")
    with pytest.raises(UserError, match=r"the prompt 'a very long .* names .*sks.* beyond the \d+ tokens that"):
        trainer(1, tmp_path).fit(mod, data)
    (photos / "a.txt").write_text("a ball" + far.removesuffix("a ball"))  # the rest may be cut
    trainer(1, tmp_path).fit(mod, SubjectData(path=str(photos), class_word="ball"))
    with pytest.raises(UserError, match="shorten it"):
        generate(mod, [far.replace("ball", mod.adapter.phrase("ball"))], [0], steps=1)
