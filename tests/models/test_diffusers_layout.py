"""diffusers folders: computed as diffusers computes them, whole or refused by name; and their VAE."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_vae, write_pipeline
from tolerances import of_pass

from harmonica.models.loading import LoadedModel, ModelConfig, load_model
from harmonica.models.vae import decode_latents

WEIGHTS = "diffusion_pytorch_model.safetensors"
Q = "transformer_blocks.1.attn1.to_q.weight"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    edit(folder / "model_index.json", id2label={"0": "tench, Tinca tinca", "2": "white shark"})
    return folder


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(pipeline, tmp_path / "pipeline")


def load(folder: Path, **settings: object) -> LoadedModel:
    return load_model(ModelConfig(path=str(folder), **settings))


def theirs(folder: Path) -> DiTTransformer2DModel:
    return DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)


@torch.inference_mode()
def worst_error(loaded: LoadedModel, reference: DiTTransformer2DModel) -> float:
    """Relative, over the noisiest, a middle and the last timestep; with the null class."""
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 999, 1000])
    errors = []
    for t in (0, 250, 999):
        timesteps = torch.full((3,), t)
        wanted = reference(noise, timesteps, labels).sample
        errors.append((loaded.model(noise, timesteps, labels) - wanted).norm() / wanted.norm())
    return max(errors).item()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "transformer" / WEIGHTS
    state = {name: value.clone() for name, value in load_file(path).items()}
    change(state)
    path.unlink()
    save_file(state, path)


@pytest.mark.parametrize("part", [".", "transformer"])
def test_a_folder_is_computed_as_diffusers_computes_it(pipeline, part):
    loaded = load(pipeline / part)
    assert worst_error(loaded, theirs(pipeline)) < of_pass(torch.float32)
    assert (loaded.model.config.downscale_freq_shift, loaded.model.config.norm_eps) == (1, 1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_epsilon_is_the_folders(folder, pipeline):
    edit(folder / "transformer" / "config.json", norm_eps=0.3)
    loaded = load(folder)
    assert worst_error(loaded, theirs(folder)) < of_pass(torch.float32)
    assert worst_error(loaded, theirs(pipeline)) > 1e-2


def test_what_the_pipeline_says_of_classes_scheduler_and_vae(pipeline):
    loaded = load(pipeline)
    assert loaded.class_names[:3] == ("tench, Tinca tinca", "1", "white shark")
    assert len(loaded.class_names) == 1000
    assert loaded.scheduler is not None
    assert loaded.scheduler["_class_name"] == "DDIMScheduler"
    assert loaded.scheduler["clip_sample"] is False
    alone = load(pipeline / "transformer")
    assert alone.class_names == tuple(map(str, range(1000)))
    assert (alone.scheduler, alone.load_vae()) == (None, None)


def in_shards(folder: Path) -> None:
    model = theirs(folder)
    (folder / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="40KB")
    assert len(list(folder.glob("transformer/*.safetensors"))) > 2


def in_pickle(folder: Path) -> None:
    model = theirs(folder)
    (folder / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(folder / "transformer", safe_serialization=False)
    assert (folder / "transformer" / "diffusion_pytorch_model.bin").is_file()


def under_the_old_name(folder: Path) -> None:
    """As facebook/DiT-XL-2-256 was saved, before `norm_eps` was a field."""
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["norm_eps"]
    path.write_text(json.dumps(config | {"_class_name": "Transformer2DModel", "num_vector_embeds": None}))


def with_positions(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"pos_embed.pos_embed": torch.zeros(1, 16, 16)}))


@pytest.mark.parametrize("form", [in_shards, in_pickle, under_the_old_name, with_positions])
def test_every_form_of_a_folder_loads(folder, pipeline, form):
    form(folder)
    loaded = load(folder)
    assert worst_error(loaded, theirs(pipeline)) < of_pass(torch.float32)
    assert loaded.model.identity() == load(pipeline).model.identity()


def test_a_pickle_that_would_execute_code_is_refused(folder, make_bomb):
    bomb, marker = make_bomb
    (folder / "transformer" / WEIGHTS).unlink()
    torch.save({Q: bomb()}, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds more than tensors and is refused"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("activation_fn", "geglu", "activation_fn is 'geglu': give a transformer with 'gelu-approximate'"),
        ("norm_elementwise_affine", True, "norm_elementwise_affine is True: .* with False"),
        ("attention_bias", False, "attention_bias is False: .* with True"),
        ("norm_type", "ada_norm_single", "norm_type is 'ada_norm_single': .* with 'ada_norm_zero'"),
        (
            "num_embeds_ada_norm",
            None,
            "model.shape.num_embeds_ada_norm is None: give a whole number",
        ),
        ("_class_name", "SD3Transformer2DModel", "config.json is of SD3Transformer2DModel: give a folder of"),
    ],
)
def test_what_is_no_dit_is_refused_by_the_field(folder, name, value, words):
    edit(folder / "transformer" / "config.json", **{name: value})
    with pytest.raises(ValueError, match=f"model.path .*transformer: {words}"):
        load(folder)


def test_weights_of_another_shape_are_named_as_the_file_names_them(folder):
    edit_weights(folder, lambda state: state.update({Q: torch.zeros(16, 17), "extra": torch.zeros(1)}))
    edit_weights(folder, lambda state: state.pop("proj_out_1.bias"))
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "lacks proj_out_1.bias; it has the unknown extra" in str(caught.value)
    assert f"another shape of {Q}, (16, 17) where the model has (16, 16)" in str(caught.value)


def test_blocks_that_embed_differently_are_refused(folder):
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    edit_weights(folder, lambda state: state[name][7, 3].add_(1e-3))
    with pytest.raises(ValueError, match=f"{name} is not that of block 0: .*give a model whose blocks"):
        load(folder)


def test_an_unusable_folder_says_what_it_holds(folder):
    (folder / "transformer" / WEIGHTS).unlink()
    with pytest.raises(
        ValueError, match=r"transformer has no diffusion_py.* it holds config.json: fetch the"
    ):
        load(folder)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "without transformer/config.json; it holds model_index.json, scheduler/, vae/: give" in str(
        caught.value
    )


def test_a_broken_index_is_refused(folder):
    in_shards(folder)
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    elsewhere = next(name for name in weight_map.values() if name != weight_map[Q])
    edit(index, weight_map=weight_map | {Q: elsewhere})
    with pytest.raises(ValueError, match=f"{elsewhere} lacks {Q}, which .*index.json places there"):
        load(folder)
    edit(index, weight_map=weight_map | {Q: "../../secrets.safetensors"})
    with pytest.raises(ValueError, match=r"index.json has no usable weight_map of file names"):
        load(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        load(folder)


@torch.inference_mode()
@pytest.mark.parametrize("shift", [None, 0.7])
def test_latents_are_decoded_as_the_pipeline_decodes_them(folder, shift):
    edit(folder / "vae" / "config.json", shift_factor=shift)
    vae = load(folder).load_vae()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    images = decode_latents(vae, latents)
    reference = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    wanted = reference.decode(latents / reference.config.scaling_factor + (shift or 0)).sample
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, wanted.clamp(-1, 1))
    assert not torch.allclose(images, wanted), "nothing was clamped"
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_configured_vae_goes_first_in_its_precision(pipeline, tmp_path):
    torch.manual_seed(5)
    make_vae().save_pretrained(tmp_path / "vae")
    for path in (tmp_path, tmp_path / "vae"):  # a pipeline's folder, or the VAE's own
        loaded = load(pipeline / "transformer", vae=str(path))
        assert loaded.vae_folder == tmp_path / "vae"
    vae = loaded.load_vae("cpu", torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert decode_latents(vae, torch.zeros(1, 4, 8, 8)).dtype == torch.float32


def test_a_vae_that_is_none_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"model.vae .*transformer holds no AutoencoderKL: give its folder"):
        load(pipeline, vae=str(pipeline / "transformer"))
    with pytest.raises(ValueError, match=r"model.vae /none does not exist"):
        load(pipeline, vae="/none")
    broken = shutil.copytree(pipeline / "vae", tmp_path / "vae")
    (broken / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model.vae .* cannot be loaded .*: give a folder of AutoencoderKL"):
        load(pipeline, vae=str(broken)).load_vae()
