"""The zoo's models of timm, without their weights, at small images."""

from __future__ import annotations

from typing import Any, Literal

from tests.symmetry.wide.entry import Built, Entry, images
from tests.symmetry.zoo import _torchvision_models as torchvision_models


def _timm(
    name: str,
    family: Literal["cnn", "other"] = "other",
    size: int = 64,
    groups: int | None = None,
    heads: int | None = None,
    unseen: bool = False,
    **options: Any,
) -> Entry:
    def make() -> Built:
        torchvision_models()  # timm imports torchvision
        import timm

        return timm.create_model(name, pretrained=False, **options), (images(size),)

    return Entry(name, "timm", family, make, groups, heads, unseen=unseen)


ENTRIES = (
    _timm("deit_tiny_patch16_224", size=32, groups=49, heads=24, img_size=32),
    _timm("mixer_s32_224", img_size=64),
    _timm("resmlp_12_224", img_size=64),
    _timm("gmlp_s16_224", img_size=64),
    _timm("convmixer_768_32", "cnn"),
    _timm("repvgg_a0", "cnn", 32),
    _timm("coatnet_nano_rw_224", img_size=64),
    _timm("cait_xxs24_224", img_size=64),
    _timm("pvt_v2_b0"),
    _timm("eva02_tiny_patch14_224", size=56, img_size=56),
    _timm("levit_128s", img_size=64),
    _timm("poolformer_s12", "cnn", unseen=True),
    _timm("resnest14d", "cnn", unseen=True),
    _timm("xcit_nano_12_p16_224", unseen=True, img_size=64),
    _timm("mobilevit_xxs", unseen=True),
    _timm("davit_tiny", unseen=True),
)
