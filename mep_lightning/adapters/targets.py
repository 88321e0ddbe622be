"""Which layers of a U-Net an adapter goes into, and under which names it keeps what is theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffusers.models.attention import FeedForward
from torch import nn

from mep_lightning.bases.frugal import BlockwiseFeedForward
from mep_lightning.errors import UserError


def matching(
    unet: nn.Module,
    targets: Sequence[str] | None,
    without: Collection[nn.Module],
    setting: str,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> dict[str, nn.Module]:
    """The layers whose names are targets, or end in one, by name, in the U-Net's order.

    Args:
        unet: in which they are.
        targets: names, or their ends after a dot; None is all layers.
        without: modules that are left as they are, with all that is in them.
        setting: what the targets are called in a message.
        kinds: of layers.

    Raises:
        UserError: a target is the name of no layer, nor the end of one; the message names those there are.
    """
    left = {part for module in without for part in module.modules()}
    layers = {name: part for name, part in unet.named_modules() if isinstance(part, kinds) and part not in left}
    if targets is None:
        return layers
    found = {name: part for name, part in layers.items() if any(_is_named(name, target) for target in targets)}
    for target in targets:
        if not any(_is_named(name, target) for name in found):
            ends = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdecimal()})
            raise UserError(
                f"{setting}: {target!r} is the name of no layer there, nor the end of one: there are "
                f"{', '.join(ends)}, and to_out.0"
            )
    return found


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def undotted(name: str) -> str:
    """A layer's name without dots, as kohya's keys and `nn.ParameterDict` want it."""
    return name.replace(".", "_")


def keep_rows_together(unet: nn.Module, layers: Collection[nn.Module]) -> None:
    """Let no feed-forward layer split its rows where these layers are: members would not lie where they look."""
    for part in unet.modules():
        if type(part) is BlockwiseFeedForward and not set(part.modules()).isdisjoint(layers):
            part.__class__ = FeedForward
