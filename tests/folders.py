"""Folders of bases in diffusers' layout, and how to spoil them."""

import json
import shutil

from diffusers import UNet2DConditionModel

from mep_lightning.tiny import BASE


def copy_of_tiny(tmp_path):
    return shutil.copytree(BASE, tmp_path / "base")


def changed(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path, key):
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


def save_sharded(folder, unet):
    """A U-Net as diffusers writes its variant fp16 in shards."""
    UNet2DConditionModel.from_pretrained(unet).half().save_pretrained(folder, variant="fp16", max_shard_size="8MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert [path.name for path in folder.glob("*.index*")] == ["diffusion_pytorch_model.safetensors.index.fp16.json"]
