"""Checkpoints as other trainers leave them: loaded, or refused with the true reason."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harmonica.io.safe_load import read_state, read_tensors
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT
from harmonica.models.loading import ModelConfig, load_model

State = dict[str, Tensor]
QKV = "blocks.1.attn.qkv.weight"


def loads_as(path: Path, state: State, shape: DiTConfig) -> bool:
    own = load_model(ModelConfig(path=str(path), shape=shape)).model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def renamed(change: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {change(name): value for name, value in state.items()}


PREFIXES = {
    "module": renamed(lambda name: f"module.{name}"),
    "compiled": renamed(lambda name: f"_orig_mod.{name}"),
    "compiled in module": renamed(lambda name: f"module._orig_mod.{name}"),
    "module in compiled": renamed(lambda name: f"_orig_mod.module.{name}"),
    "compiled blocks": renamed(lambda name: name.replace("blocks.1.", "blocks.1._orig_mod.")),
    "compiled layers": renamed(lambda name: name.replace(".attn.", ".attn._orig_mod.")),
    "fsdp": renamed(lambda name: "_fsdp_wrapped_module." + name.replace("mlp.", "mlp._fsdp_wrapped_module.")),
    "checkpointed": renamed(lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")),
    "lightning": renamed(lambda name: f"model.{name}"),
    "averaged": lambda state: {"n_averaged": torch.tensor(9)} | PREFIXES["module"](state),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_what_wrapping_puts_into_names_is_taken_off(
    path: Path, state: State, tiny_shape: DiTConfig, name: str
) -> None:
    torch.save(PREFIXES[name](state), path)
    assert loads_as(path, state, tiny_shape)


def others(state: State) -> State:
    """Another training of the same model."""
    return {name: value + 1 for name, value in state.items()}


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "step": torch.tensor(7)},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "hyper_parameters": {"lr": 1e-4}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "no ema": lambda s: {"ema": None, "model": s},
    "empty ema": lambda s: {"ema": {}, "model": s},
    "ema of no tensors": lambda s: {"ema": {"decay": 0.999}, "model": s},
    "ema first": lambda s: {"model": others(s), "ema": s},
    "nested": lambda s: {"state_dict": {"model": s}},
    "nested ema": lambda s: {"checkpoint": {"model": others(s), "ema": {"shadow": s, "decay": 0.999}}},
    "wrapped and prefixed": lambda s: {"model": PREFIXES["compiled in module"](s)},
    "zero ema": lambda s: {"model": s, "ema": zeros(s)},
    "zero ema of zero bytes first": lambda s: {"ema": zeros(s), "model": s},
    "broken ema": lambda s: {"model": s, "ema": {name: value * torch.nan for name, value in s.items()}},
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "before 1.6"])
def test_wrappers_are_taken_off_and_the_average_goes_first_where_it_is_one(
    path: Path, state: State, tiny_shape: DiTConfig, name: str, is_old: bool
) -> None:
    torch.save(WRAPPERS[name](state), path, _use_new_zipfile_serialization=not is_old)
    assert loads_as(path, state, tiny_shape)


def test_an_average_that_is_passed_over_is_told(
    path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": state, "ema": zeros(state)}, path)
    with caplog.at_level(logging.WARNING):
        read_state(path)
    (said,) = caplog.messages
    assert said.endswith(
        "'ema' is passed over since its x_embedder.proj.weight is all zero, 'model' is taken"
    )
    caplog.clear()
    torch.save({"model": others(state), "ema": state}, path)
    read_state(path)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"ema": None, "opt": {}}, r"holds no named tensors, it has ema \(NoneType\), opt \(dict\): give a"),
        ({}, "holds no named tensors, it has no keys"),
        ([torch.zeros(2)], "holds no named tensors but a list: give a state dict"),
        ({"model": {"a.w": torch.ones(2), "a._orig_mod.w": torch.ones(2)}}, "has a.w twice, once as a._orig"),
    ],
)
def test_what_is_no_state_dict_says_what_it_is(path: Path, contents: object, words: str) -> None:
    torch.save(contents, path)
    with pytest.raises(ValueError, match=words):
        read_state(path)


@pytest.mark.parametrize("name", ["dit.pt", "dit.ckpt", "dit.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "before 1.6", "safetensors"])
def test_a_file_is_what_its_first_bytes_say(
    tmp_path: Path, state: State, tiny_shape: DiTConfig, name: str, kind: str
) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    assert loads_as(path, state, tiny_shape)


@pytest.mark.parametrize("keep", [100, 400, -1000, -10])
def test_a_cut_file_of_the_old_format_is_refused_as_one(path: Path, state: State, keep: int) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cannot be read, it may be truncated: fetch it again"):
        read_state(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"cannot be read, it may be truncated: fetch it again \(it is empty\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS and not the weights"),
        (b"<!DOCTYPE html><html>Not found", "is a web page and no checkpoint: fetch the file itself"),
        (
            b"\x89HDF\r\n\x1a\n",
            "is no checkpoint, it begins with .*HDF.*: give what torch.save or safetensors",
        ),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_state(path)


class Settings:
    """A trainer's own."""


@pytest.mark.parametrize("is_old", [False, True])
def test_objects_beside_the_tensors_are_refused_by_their_name(path: Path, state: State, is_old: bool) -> None:
    contents = {"model": state, "settings": Settings()}
    torch.save(contents, path, _use_new_zipfile_serialization=not is_old)
    words = (
        r"holds more than tensors and is refused \([\w.]+Settings would have to be executed\): save its state"
    )
    with pytest.raises(ValueError, match=words):
        read_state(path)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_tensor_that_is_larger_than_its_file_is_refused(
    path: Path, state: State, is_old: bool, is_sparse: bool
) -> None:
    shape = (2**20, 2**20)
    empty = torch.empty(2, 0, dtype=torch.long), torch.empty(0)
    bomb = torch.sparse_coo_tensor(*empty, shape) if is_sparse else torch.zeros(1).expand(shape)
    small = torch.arange(4).expand(100, 4)  # as some buffers are
    torch.save({"model": state | {"small": small}}, path, _use_new_zipfile_serialization=not is_old)
    assert torch.equal(read_tensors(path)["model"]["small"], small)
    torch.save({"model": state | {"bomb": bomb}}, path, _use_new_zipfile_serialization=not is_old)
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"holds a tensor of shape \(1048576, 1048576\) that stores fewer"):
        read_tensors(path)


def test_safetensors_beside_pt(tmp_path: Path, state: State, tiny_shape: DiTConfig) -> None:
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=r"dit.pt does not exist: give .*dit.safetensors, which does"):
        read_state(tmp_path / "dit.pt")
    torch.save(others(state), tmp_path / "dit.pt")
    assert loads_as(tmp_path, state, tiny_shape), "of a folder with both, the safetensors"
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"several checkpoints, dit.safetensors, other.pt: give the path of"):
        load_model(ModelConfig(path=str(tmp_path), shape=tiny_shape))


def test_a_weight_that_half_precision_cannot_hold_is_told_so(
    path: Path, state: State, tiny_shape: DiTConfig
) -> None:
    state[QKV][0, 0] = 1e5  # float16 ends at 65504
    torch.save(state, path)
    assert loads_as(path, state, tiny_shape)
    load_model(ModelConfig(path=str(path), shape=tiny_shape, dtype="bfloat16"))
    with pytest.raises(
        ValueError, match=rf"{QKV} not finite in float16: .* or set model.dtype to bfloat16 or"
    ):
        load_model(ModelConfig(path=str(path), shape=tiny_shape, dtype="float16"))


def test_an_untrained_model_whose_gates_are_zero_loads(path: Path, tiny_shape: DiTConfig) -> None:
    model = DiT(tiny_shape)
    model.initialize(torch.Generator().manual_seed(0))
    state = model.state_dict()
    assert (
        not state["blocks.0.adaLN_modulation.1.weight"].any() and not state["final_layer.linear.weight"].any()
    )
    torch.save({"ema": state, "model": others(state)}, path)
    assert loads_as(path, state, tiny_shape), "an average of it is no worse"
