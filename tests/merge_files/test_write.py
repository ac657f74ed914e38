"""Where a merge is written, by which names and types; what it puts away: no name left, one line on a full disk.

Reference: the tensors themselves; /proc, and a file system of 1 MB of its own (a tmpfs, where one may be mounted).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dimat.cli import main
from dimat.errors import DataError
from dimat.merge_files.write import SMALL, Scratch
from tests.merge_files.models import metadata, read_model, weights, write_folder


def test_large_tensors_are_on_disk_without_a_name(tmp_path: Path) -> None:
    """Numbers and shape stay; nothing is to be seen in the folder, and the room is used."""
    tensor = torch.randn(700, 800, generator=torch.Generator().manual_seed(0))
    found = Scratch(tmp_path)(tensor)
    assert torch.equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()
    assert not [*tmp_path.iterdir()]
    mapped = Path("/proc/self/maps").read_text() if os.path.exists("/proc/self/maps") else None
    if mapped is not None:
        assert f"{tmp_path}/.dimat-" in mapped
        del found
        assert f"{tmp_path}/.dimat-" not in Path("/proc/self/maps").read_text()


def test_what_is_not_worth_it_stays(tmp_path: Path) -> None:
    small = torch.zeros(SMALL // 8, dtype=torch.float64)
    assert Scratch(tmp_path)(small) is small
    numbers = torch.zeros(SMALL, dtype=torch.complex64)
    assert Scratch(tmp_path)(numbers) is numbers


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """Before anything is mapped: a write to a hole on a full disk is a signal that kills."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs to mount a file system: run as root")
    try:
        with pytest.raises(DataError, match=r"cannot store 4,000,000 bytes .* in .*: No space left on device"):
            Scratch(tmp_path)(torch.ones(1000, 1000))
        assert not [*tmp_path.iterdir()]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Folders a and b, in the working directory; returns the mean of both."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("a"), weights(0))
    write_folder(Path("b"), weights(1))
    return {n: (t + weights(1)[n]) / 2 for n, t in weights(0).items() if t.is_floating_point()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("full", [True, False])
def test_a_link_to_a_folder_stays(models: dict[str, Tensor], full: bool) -> None:
    """What it leads to is written, and nothing is left beside it."""
    Path("disk").mkdir()
    if full:
        write_folder(Path("disk", "models"), weights(2), shards=2)
    else:
        Path("disk", "models").mkdir()
    Path("link").symlink_to("disk/models")
    assert main(["merge", "a", "b", "-o", "link", "--overwrite"]) == 0
    assert Path("link").is_symlink()
    assert close(read_model(Path("disk/models/model.safetensors")), models)
    assert sorted(path.name for path in Path("disk/models").glob("*.safetensors*")) == ["model.safetensors"]
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "disk", "link"]
    assert [path.name for path in Path("disk").iterdir()] == ["models"]


def test_an_output_spares_its_inputs(models: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose weights would be replaced, the statistics of a model, a link that leads nowhere."""
    Path("loop").symlink_to("loop")
    recipe = 'models = [{ path = "a" }, { path = "b", statistics = "old/fisher.safetensors" }]\nout = "old"\n'
    Path("recipe.toml").write_text(recipe)
    Path("old").mkdir()
    save_file(weights(0), "old/fisher.safetensors")
    for arguments, message in (
        (["a/model.safetensors", "b", "-o", "a"], "a holds the input a/model.safetensors, which it would replace"),
        (["recipe.toml"], "old holds the input old/fisher.safetensors"),
        (["a", "b", "-o", "loop"], "loop cannot be followed: its symbolic links lead in a circle"),
    ):
        assert main(["merge", *arguments, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert close(read_model(Path("a")), {n: t for n, t in weights(0).items() if t.is_floating_point()})


def test_values_that_the_written_type_does_not_hold(
    models: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """float16 ends at 65,504: they are told, not written as infinite; bfloat16 holds them."""
    for name, value in (("c", 7e4), ("d", 8e4)):
        save_file({"w.weight": torch.full((2, 2), value), "mask": torch.full((2,), -3e38)}, f"{name}.safetensors")
    files = ["c.safetensors", "d.safetensors"]
    assert main(["merge", *files, "-o", "o.safetensors", "--dtype", "fp16"]) == 1
    assert "tensor 'w.weight' holds 4 values that are too large for F16" in capsys.readouterr().err
    assert not Path("o.safetensors").exists()
    assert main(["merge", *files, "-o", "o.safetensors", "--dtype", "bf16"]) == 0
    assert load_file("o.safetensors")["w.weight"].tolist() == [[74752.0, 74752.0]] * 2


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_of_diffusers_keeps_its_names(models: dict[str, Tensor], shards: int) -> None:
    """diffusers finds what is merged by the names that it looks for itself."""
    for name, seed in (("a", 0), ("b", 1)):
        folder = write_folder(Path(f"unet-{name}"), weights(seed), shards)
        for file in [*folder.glob("model*")]:
            text = file.name.endswith(".json") and file.read_text().replace('"model-', '"diffusion_pytorch_model-')
            if text:
                file.write_text(text)
            file.rename(folder / f"diffusion_pytorch_{file.name}")
    assert main(["merge", "unet-a", "unet-b", "-o", "out"]) == 0
    assert close(load_file("out/diffusion_pytorch_model.safetensors"), models)
    assert main(["merge", "unet-a", "unet-b", "-o", "parts", "--shard-size", "700"]) == 0
    assert sorted(p.name for p in Path("parts").glob("*.index.json")) == [
        "diffusion_pytorch_model.safetensors.index.json"
    ]
    assert main(["merge", "parts", "unet-b", "-o", "again"]) == 0


def test_other_folders_say_what_they_are(models: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline's parts are merged one by one; an adapter in shards is read by nobody."""
    Path("pipe/unet").mkdir(parents=True)
    Path("pipe/model_index.json").write_text("{}")
    save_file(weights(0), "pipe/unet/diffusion_pytorch_model.safetensors")
    Path("shards").mkdir()
    Path("shards/adapter_model.safetensors.index.json").write_text("{}")
    for name, message in (
        ("pipe", "pipe is a pipeline of several models: merge its parts one by one, e.g. pipe/unet"),
        ("shards", "shards is an adapter in shards, which PEFT does not read"),
    ):
        assert main(["merge", name, "b", "-o", "out"]) == 5
        assert message in capsys.readouterr().err


def test_files_of_another_library(models: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """Its order of axes is not PyTorch's: not merged with it, and written as what it is."""
    for name, kind in (("pt", "pt"), ("mlx", "mlx"), ("more", "mlx")):
        save_file(weights(0), f"{name}.safetensors", metadata={"format": kind})
    assert main(["merge", "pt.safetensors", "mlx.safetensors", "-o", "out.safetensors"]) == 5
    told = "pt.safetensors is of format 'pt', mlx.safetensors of 'mlx': libraries order the axes"
    assert told in capsys.readouterr().err
    assert main(["merge", "mlx.safetensors", "more.safetensors", "-o", "out.safetensors"]) == 0
    assert metadata(Path("out.safetensors"))["format"] == "mlx"
