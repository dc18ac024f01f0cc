"""The public DiT family: shapes by name, and the shape that a bare checkpoint shows by itself."""

import pytest
import torch

from harmonica.models.dit.config import FAMILY, DiTConfig, dit_shape
from harmonica.models.dit.model import DiT
from harmonica.models.dit.public_layout import infer_shape
from harmonica.models.dit.stored import skeleton
from harmonica.models.loading import ModelConfig, load_model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dit.pt"


@pytest.mark.parametrize(
    ("name", "millions"), [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/8", 459), ("DiT-XL/2", 675)]
)
def test_the_family_has_the_published_sizes(name, millions):
    sizes = [value.numel() for value in skeleton(dit_shape(name)).state_dict().values()]
    assert round(sum(sizes) / 1e6) == millions
    if name == "DiT-XL/2":
        assert sum(sizes) == 675_129_632


def test_the_family_by_name():
    assert len(FAMILY) == 12
    assert dit_shape("DiT-XL/2") == DiTConfig()
    small = dit_shape("DiT-S/8", image_size=512, num_classes=7)
    assert (small.sample_size, small.patch_size, small.hidden_size, small.num_layers) == (64, 8, 384, 12)
    assert (small.num_attention_heads, small.num_embeds_ada_norm) == (6, 7)
    with pytest.raises(ValueError, match=r"model name is 'DiT-M/2': give one of DiT-S/2, DiT-S/4"):
        dit_shape("DiT-M/2")
    with pytest.raises(ValueError, match=r"image_size is 200: give a multiple of 64 for DiT-B/8"):
        dit_shape("DiT-B/8", image_size=200)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("image_size", [256, 512])
def test_a_bare_checkpoint_shows_its_shape(name, image_size):
    shape = dit_shape(name, image_size)
    assert infer_shape(skeleton(shape).state_dict(), "here") == shape


def test_odd_shapes_of_a_family_width_are_inferred(path):
    odd = DiTConfig(
        sample_size=12,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        num_attention_heads=6,
        attention_head_dim=64,
        num_embeds_ada_norm=5,
    )
    torch.save(DiT(odd).state_dict(), path)
    assert load_model(ModelConfig(path=str(path))).model.config == odd
    state = DiT(odd).state_dict()
    del state["pos_embed"]
    torch.save(state, path)
    assert load_model(ModelConfig(path=str(path))).model.config.sample_size == 32, "nothing says another"


def test_a_shape_that_cannot_be_inferred_is_asked_for(path, tiny_dit):
    torch.save(tiny_dit.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"of width 48 and model.shape is not set: give its shape, the number"
    ):
        load_model(ModelConfig(path=str(path)))
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"has no x_embedder.proj.weight, but conv.weight: it is no DiT"):
        load_model(ModelConfig(path=str(path)))
