"""Prior preservation: what the class looks like is drawn by the base as it was before training."""

import numpy as np
import pytest
from lightning import Trainer
from PIL import Image

from mep_lightning import PersonalizationModule, SubjectData
from mep_lightning.adapters import FullUNet, LoRA
from mep_lightning.callbacks import PriorPreservation
from mep_lightning.callbacks.prior import _count
from mep_lightning.errors import UserError

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)


def fitted(folder, adapter, steps, checkpoint=None):
    module = PersonalizationModule("tiny", adapter=adapter, lr=0.1 if isinstance(adapter, LoRA) else "auto")
    prior = PriorPreservation(images=2)
    trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[prior], default_root_dir=folder, **QUIET)
    trainer.fit(module, SubjectData(), ckpt_path=checkpoint, weights_only=True)
    return trainer


def test_a_picture_that_a_resumed_lora_lacks_is_drawn_without_the_lora(tmp_path):
    fitted(tmp_path, LoRA(rank=2), 2).save_checkpoint(tmp_path / "two.ckpt")
    picture = tmp_path / "prior" / "00001.png"
    before = levels(picture)
    picture.unlink()
    fitted(tmp_path, LoRA(rank=2), 3, tmp_path / "two.ckpt")
    assert np.abs(levels(picture) - before).max() <= 2  # drawn alone it rounds otherwise


def levels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_that_a_resumed_full_fine_tuning_lacks_are_asked_for(tmp_path):
    fitted(tmp_path, FullUNet(), 1).save_checkpoint(tmp_path / "one.ckpt")
    fitted(tmp_path, FullUNet(), 2, tmp_path / "one.ckpt")  # all are there
    (tmp_path / "prior" / "00001.png").unlink()
    with pytest.raises(UserError, match="prior lacks 1 of 2 pictures of the class, and .* trained over: put them back"):
        fitted(tmp_path, FullUNet(), 2, tmp_path / "one.ckpt")


def test_a_folder_without_a_picture_in_it_lacks_them_all(tmp_path):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "notes.txt").touch()
    assert _count(tmp_path) == _count(tmp_path / "nowhere") == 0
    Image.new("RGB", (64, 64)).save(tmp_path / "00003.png")
    assert _count(tmp_path) == 1
