"""Weights from disk: what loads, what is refused and in which words. Nothing from outside is executed."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harmonica.checkpoints import load_weights, read_released_router, read_tensors
from harmonica.models.dit import DiT
from harmonica.models.loading import ModelConfig, load_model, write_folder_config


@pytest.fixture
def state(tiny_dit):
    return tiny_dit.float().state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dit.pt"


def same(model, state) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"ema": state, "model": {}, "opt": {}}])
def test_the_public_layout_loads_with_and_without_ema(path, state, tiny_shape, wrap):
    assert "blocks.0.attn.qkv.weight" in state
    torch.save(wrap(state), path)
    loaded = load_model(ModelConfig(path=str(path), shape=tiny_shape))
    assert same(loaded.model, state)
    assert loaded.class_names == tuple("0123456789")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_positions_are_those_of_the_public_code(tiny_shape):
    recorded = read_tensors(Path(__file__).parent / "assets" / "case_a" / "dit_official.pt")
    torch.testing.assert_close(DiT(tiny_shape).pos_embed, recorded["pos_embed"])


def test_positions_may_be_left_out(path, state, tiny_shape):
    torch.save({name: value for name, value in state.items() if name != "pos_embed"}, path)
    assert same(load_model(ModelConfig(path=str(path), shape=tiny_shape)).model, state)


def test_a_folder_brings_its_shape_and_class_names(tmp_path, state, tiny_shape):
    names = tuple("abcdefghij")
    save_file(state, tmp_path / "model.safetensors")
    write_folder_config(tmp_path, tiny_shape, names, data="none")
    loaded = load_model(ModelConfig(path=str(tmp_path)))
    assert same(loaded.model, state)
    assert (loaded.model.config, loaded.class_names) == (tiny_shape, names)


def test_half_precision_is_widened(tmp_path, state, tiny_shape):
    half = {name: value.half() for name, value in state.items()}
    save_file(half, tmp_path / "dit.safetensors")
    model = DiT(tiny_shape)
    load_weights(model, tmp_path / "dit.safetensors")
    assert same(model, {name: value.float() for name, value in half.items()})
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_a_truncated_file_is_refused(tmp_path, state, suffix, keep):
    path = (tmp_path / "dit").with_suffix(suffix)
    (torch.save if suffix == ".pt" else save_file)(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"checkpoint .*dit{suffix} cannot be read, it may be truncated"):
        read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.pt does not exist: give the path of a .safetensors or .pt"):
        read_tensors(tmp_path / "none.pt")


def test_a_checkpoint_of_another_model_names_the_key(path, state, tiny_dit):
    def load(changed: object) -> None:
        torch.save(changed, path)
        load_weights(tiny_dit, path)

    with pytest.raises(ValueError, match=r"another shape of x_embedder.proj.bias: it was made for another"):
        load(state | {"x_embedder.proj.bias": torch.zeros(47)})
    with pytest.raises(ValueError, match=r"lacks blocks.1.mlp.fc1.bias: .* change model.\* or the path"):
        load({name: value for name, value in state.items() if name != "blocks.1.mlp.fc1.bias"})
    with pytest.raises(ValueError, match=r"has the unknown blocks.3.attn.qkv.bias"):
        load(state | {"blocks.3.attn.qkv.bias": torch.zeros(144)})
    with pytest.raises(ValueError, match=r"holds no named tensors: give a state dict"):
        load(list(state.values()))
    with pytest.raises(ValueError, match=r"holds no named tensors: give a state dict"):
        load({"ema": torch.zeros(3)})


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_that_would_execute_code_is_refused(path, tiny_shape, make_bomb, save):
    bomb, marker = make_bomb
    save({"ema": bomb()}, path)
    with pytest.raises(ValueError, match=r"checkpoint .*dit.pt"):
        load_model(ModelConfig(path=str(path), shape=tiny_shape))
    assert not marker.exists()


def test_what_cannot_be_loaded_says_what_to_give(path, tmp_path, state):
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"dit.pt is a bare checkpoint and model.shape is not set"):
        load_model(ModelConfig(path=str(path)))
    with pytest.raises(ValueError, match=r"model.path /none does not exist: give builtin:fashion-dit"):
        load_model(ModelConfig(path="/none"))
    with pytest.raises(ValueError, match=r"no usable config.json .*: give a folder with config.json"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"shape": {"depth": 3}}')
    with pytest.raises(ValueError, match=r"no usable config.json .*'depth'"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_folder_without_weights_names_the_file(tmp_path, tiny_shape):
    write_folder_config(tmp_path, tiny_shape, ())
    with pytest.raises(ValueError, match=r"model.safetensors does not exist"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_released_routers_come_in_the_order_of_their_steps(path):
    logits = torch.arange(24.0).reshape(12, 2)
    rows = {f"{i}.prob": logits[i] for i in sorted(range(12), key=str)}  # as text, 10 is before 2
    torch.save({"routers": rows, "opt": {}}, path)
    assert torch.equal(read_released_router(path), logits)
    torch.save({"opt": {}}, path)
    with pytest.raises(ValueError, match=r"has no `routers`"):
        read_released_router(path)
    torch.save({"routers": {"0.prob": logits[0], "2.prob": logits[2]}}, path)
    with pytest.raises(ValueError, match=r"lacks '1.prob'"):
        read_released_router(path)


def test_a_saved_model_reads_back_through_either_format(tmp_path, path, state):
    torch.save(state, path)
    save_file(state, tmp_path / "dit.safetensors")
    assert read_tensors(path).keys() == load_file(tmp_path / "dit.safetensors").keys()
