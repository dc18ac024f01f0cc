"""Weights from disk: what loads, what is refused and in which words. Nothing from outside is executed."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import of_pass

from harmonica.io.safe_load import load_weights, read_released_router, read_tensors
from harmonica.models.diffusers_folder import write_diffusers
from harmonica.models.dit.config import dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.loading import ModelConfig, load_model, read_model, write_folder_config


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
    recorded = read_tensors(Path(__file__).parents[1] / "assets" / "case_a" / "dit_official.pt")
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


def without(state, *parts: str) -> dict:
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


def test_a_checkpoint_of_another_model_names_the_keys(path, state, tiny_dit, tiny_shape):
    def said(changed: object) -> str:
        torch.save(changed, path)
        with pytest.raises(ValueError) as copied:
            load_weights(tiny_dit, path)
        with pytest.raises(ValueError) as mapped:
            load_model(ModelConfig(path=str(path), shape=tiny_shape))
        assert str(copied.value) == str(mapped.value)
        return str(copied.value)

    wrong = state | {"blocks.1.mlp.fc1.weight": torch.zeros(48, 192)}
    assert "shape of blocks.1.mlp.fc1.weight, (48, 192) where the model has (192, 48): it" in said(wrong)
    text = said(without(state, "blocks.1.", "t_embedder"))
    assert "lacks t_embedder.mlp.0.weight, t_embedder.mlp.0.bias, t_embedder.mlp.2.weight, " in text
    assert text.count("blocks.1.") == 1
    assert "and 9 more: it was made for another model than the configured one, change model.*" in text
    extra = {f"blocks.{i}.attn.qkv.bias": torch.zeros(144) for i in range(3, 9)}
    text = said(without(state, "blocks.0.mlp.fc2.bias") | extra)
    assert "dit.pt lacks blocks.0.mlp.fc2.bias; it has the unknown blocks.3.attn.qkv.bias, blocks.4" in text
    assert "blocks.7.attn.qkv.bias and 1 more: " in text
    quantised = state | {"final_layer.linear.bias": torch.zeros(32, dtype=torch.int8)}
    assert "final_layer.linear.bias, (32,) torch.int8 where the model has (32,)" in said(quantised)
    assert "final_layer.linear.bias, float where the model" in said(state | {"final_layer.linear.bias": 1.0})
    assert "holds no named tensors but a list: give a state dict" in said(list(state.values()))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_that_would_execute_code_is_refused(path, tiny_shape, make_bomb, save):
    bomb, marker = make_bomb
    save({"ema": bomb()}, path)
    with pytest.raises(ValueError, match=r"checkpoint .*dit.pt"):
        load_model(ModelConfig(path=str(path), shape=tiny_shape))
    assert not marker.exists()


def test_what_cannot_be_loaded_says_what_to_give(path, tmp_path, state):
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"model.path /none does not exist: give builtin:fashion-dit"):
        load_model(ModelConfig(path="/none"))
    path.rename(tmp_path / "dit.data")
    with pytest.raises(ValueError, match=r"no usable config.json .*; it holds dit.data: give a folder with"):
        load_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"shape": {"depth": 3}}')
    with pytest.raises(ValueError, match=r"no usable config.json .*'depth'"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"model.dtype is 'int8': give one of float32, bfloat16, float16"):
        ModelConfig(dtype="int8")  # type: ignore[arg-type]


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision_changes_the_numbers_but_not_who_the_model_is(path, state, tiny_shape, dtype):
    torch.save(state, path)
    config = ModelConfig(path=str(path), shape=tiny_shape)
    full = load_model(config).model
    half = load_model(dataclasses.replace(config, dtype=dtype)).model
    for name, value in half.state_dict().items():
        kept = name.startswith(half.full_precision_parts)
        assert value.dtype == (torch.float32 if kept else getattr(torch, dtype)), name
    assert half.dtype == getattr(torch, dtype)
    assert half.identity() == full.identity()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([999, 3]), torch.tensor([1, 10])
    output, wanted = half(*inputs), full(*inputs)
    assert 1e-5 < (output - wanted).norm() / wanted.norm() < of_pass(half.dtype)
    precise = full(inputs[0].double(), *inputs[1:])  # a sampler may be
    assert (precise - wanted).norm() / wanted.norm() < of_pass(torch.float32)
    half.initialize(torch.Generator().manual_seed(5))
    assert half.fingerprint() != full.fingerprint()


def test_writing_to_a_loaded_model_leaves_its_file_alone(tmp_path, state, tiny_shape):
    for name, save in (("dit.pt", torch.save), ("dit.safetensors", save_file)):
        save(state, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        model = load_model(ModelConfig(path=str(tmp_path / name), shape=tiny_shape)).model
        with torch.no_grad():
            model.x_embedder.proj.weight.zero_()
        assert (tmp_path / name).read_bytes() == before


@pytest.fixture
def tf32_backends():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield backends
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


def test_tf32_is_allowed_only_on_request(tf32_backends):
    load_model(ModelConfig())
    assert [backend.allow_tf32 for backend in tf32_backends] == [False, False]
    load_model(ModelConfig(allow_tf32=True))
    assert [backend.allow_tf32 for backend in tf32_backends] == [True, True]


MEMORY = """
import gc, re, sys, threading
from pathlib import Path
import torch
from harmonica.models.loading import ModelConfig, load_model

torch.set_num_threads(1)
def anonymous():  # the mapped pages of a file are not ours: the kernel takes them back at will
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of(config):
    gc.collect()
    before, seen, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous() - before)
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(config).model
    seen.append(anonymous() - before)
    done.set()
    watcher.join()
    return max(seen) / sum(value.nbytes for value in model.state_dict().values())

load_model(ModelConfig())  # what importing costs is not counted
for path in sys.argv[1:]:
    for dtype in ("bfloat16", "float32"):
        print(peak_of(ModelConfig(path=path, dtype=dtype)))
"""


def test_loading_costs_the_weights_once(tmp_path):
    model = DiT(dit_shape("DiT-S/2"))
    paths = [tmp_path / name for name in ("dit.pt", "dit.safetensors", "folder")]
    torch.save(model.state_dict(), paths[0])
    save_file(model.state_dict(), paths[1])
    assert paths[0].stat().st_size > 130e6
    write_diffusers(paths[2], read_model(str(paths[0])))
    # So that freed memory goes back, and is not reused unseen by the next loading.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shares = [float(line) for line in result.stdout.split()]
    converted, kept = shares[::2], shares[1::2]
    assert all(0.9 < share < 1.4 for share in converted), converted  # twice float32 would be 3, once it 2
    assert all(share < 0.1 for share in kept[:2]), kept  # mapped
    assert kept[2] < 0.3, kept  # only q, k and v are put together
