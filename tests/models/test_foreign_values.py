"""Checkpoints of other trainers by their shapes and values: loaded, or refused by a tensor's name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harmonica.io.weight_values import check_values
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT, sincos_position_embedding
from harmonica.models.dit.public_layout import infer_shape
from harmonica.models.loading import ModelConfig, load_model
from tests.models.test_foreign_checkpoints import QKV, State, zeros

# The shape


def small_public() -> State:
    """DiT-S/8 of two blocks, for 64 x 64 latents."""
    shape = DiTConfig(
        sample_size=64, patch_size=8, num_layers=2, num_attention_heads=6, attention_head_dim=64
    )
    model = DiT(shape)
    model.initialize(torch.Generator().manual_seed(0), zero=False)
    return model.state_dict()


def test_positions_are_made_where_a_trainer_leaves_them_out(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = small_public()
    assert infer_shape(state, "x").sample_size == 64
    assert not caplog.messages
    del state["pos_embed"]
    torch.save(state, path)
    model = load_model(ModelConfig(path=str(path))).model
    assert (model.sample_size, model.num_tokens if hasattr(model, "num_tokens") else 16) == (32, 16)
    torch.testing.assert_close(model.pos_embed, sincos_position_embedding(384, 4))
    assert "has no pos_embed, which alone tells the image size: 32 is taken, give model.shape" in caplog.text
    shape = DiTConfig(
        sample_size=64, patch_size=8, num_layers=2, num_attention_heads=6, attention_head_dim=64
    )
    larger = load_model(ModelConfig(path=str(path), shape=shape)).model
    torch.testing.assert_close(larger.pos_embed, sincos_position_embedding(384, 8))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)},
            "has the names of a diffusers module, whose shape is in its config.json: give the folder of both",
        ),
        (
            {f"unet.{i}.weight": torch.ones(2, 2) for i in range(9)},
            r"has no x_embedder.proj.weight, but unet.0.weight, unet.1.weight, unet.2.weight and 6 more: it",
        ),
        (
            {"x_embedder.proj.weight": torch.ones(2, 2)},
            r"has a x_embedder.proj.weight of shape \(2, 2\), but .*: it is no DiT in the public layout",
        ),
    ],
)
def test_another_model_s_file_says_what_it_has(path: Path, state: State, words: str) -> None:
    torch.save(state, path)
    with pytest.raises(ValueError, match=words):
        load_model(ModelConfig(path=str(path)))


# The values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [QKV, "blocks.2.mlp.fc2.bias", "pos_embed", "final_layer.linear.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    path: Path, state: State, tiny_shape: DiTConfig, name: str, value: float, dtype: Any
) -> None:
    state[name].view(-1)[-1] = value
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=rf"checkpoint .*dit.pt has {name} not finite in (b?)float\d\d: take a"
    ):
        load_model(ModelConfig(path=str(path), shape=tiny_shape, dtype=dtype))


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.proj.weight",
        QKV,
        "blocks.0.attn.proj.weight",
        "blocks.2.mlp.fc1.weight",
        "blocks.2.mlp.fc2.weight",
    ],
)
def test_a_matrix_that_no_trained_model_has_at_zero_is_refused_by_name(
    path: Path, state: State, tiny_shape: DiTConfig, name: str
) -> None:
    state[name].zero_()
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"has {name} all zero, which no trained model has"):
        load_model(ModelConfig(path=str(path), shape=tiny_shape))


def test_a_model_of_zeros_is_refused(path: Path, state: State, tiny_shape: DiTConfig) -> None:
    for contents in (zeros(state), {"model": zeros(state), "ema": zeros(state)}, {"ema": zeros(state)}):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=r"has x_embedder.proj.weight and \d+ more tensors all zero"):
            load_model(ModelConfig(path=str(path), shape=tiny_shape))


def test_names_of_every_layout_are_evaluated() -> None:
    zero = torch.zeros(2, 2)
    for name in (
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn2.to_k.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
        "transformer_blocks.0.ff.conv_point.weight",
        "pos_embed.proj.weight",
        "patch_embed.proj.weight",
    ):
        with pytest.raises(ValueError, match=f"x has {name} all zero"):
            check_values({name: zero}, "x")
    for name in (
        "transformer_blocks.0.attn2.to_out.0.weight",  # PixArt starts it at zero
        "transformer_blocks.0.norm1.linear.weight",
        "transformer_blocks.0.scale_shift_table",
        "pos_embed.pos_embed",
        "proj_out.weight",
    ):
        check_values({name: zero}, "x")
    check_values({"transformer_blocks.0.attn1.to_q.bias": torch.zeros(2), "empty": torch.zeros(0, 2)}, "x")


def test_every_value_is_looked_at_and_nothing_is_copied() -> None:
    """The last of a million, in every precision; float16's sum would overflow where its values do not."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.full((1000, 1000), 6e4).to(dtype)
        check_values({QKV: tensor}, "x")
        tensor[-1, -1] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            check_values({QKV: tensor}, "x")
