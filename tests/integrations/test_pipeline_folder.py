"""Folders of diffusers pipelines: which are refused, what prompts are encoded to, how that is kept."""

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    HunyuanDiTPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from tiny_pipeline_folder import SIZE, make_pipeline, write_pipeline_folder
from tiny_recorded_pipelines import make_case
from torch import Tensor

from harmonica.data.embedding_store import (
    EmbeddingManifest,
    EmbeddingStore,
    embeddings_part,
    read_embedding_manifest,
)
from harmonica.data.prompt_files import MANIFEST, part_path
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.pipeline_training.prompt_encoding import PipelinePromptEncoder, embedding_names
from harmonica.pipeline_training.sampling import sample_pipeline
from harmonica.pipeline_training.trainable import check_trainable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PipelineFolder:
    return PipelineFolder.read(str(write_pipeline_folder(tmp_path_factory.mktemp("pipeline") / "p")))


def _index(tmp_path: Path, class_name: str, **parts: list[str]) -> PipelineFolder:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name, **parts}))
    return PipelineFolder.read(str(tmp_path))


FLUX_TRANSFORMER = ["diffusers", "FluxTransformer2DModel"]


@pytest.mark.parametrize(
    ("class_name", "parts", "call", "words"),
    [
        (
            "StableDiffusionPipeline",
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            {},
            "which has no transformer: its denoiser is a UNet; give a pipeline with",
        ),
        ("NoSuchPipeline", {"transformer": FLUX_TRANSFORMER}, {}, "which diffusers .* does not have"),
        (
            "FluxPipeline",
            {"transformer": ["diffusers", "Kandinsky6SRTransformer3DModel"]},
            {},
            "with a Kandinsky6SRTransformer3DModel, which has no plan: its attention is flex_attention",
        ),
        ("WanPipeline", {"transformer": ["diffusers", "WanTransformer3DModel"]}, {}, "takes num_frames"),
        ("FluxInpaintPipeline", {"transformer": FLUX_TRANSFORMER}, {}, "does not draw images from prompts"),
        ("DiTPipeline", {"transformer": ["diffusers", "DiTTransformer2DModel"]}, {}, "from prompts alone"),
        (
            "StableDiffusion3Pipeline",
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            {"true_cfg_scale": 2.0},
            "pipeline.true_cfg_scale is 2.0, and .* whose call does not take it: leave it out",
        ),
    ],
)
def test_a_pipeline_that_cannot_be_trained_is_refused_by_its_index(
    class_name: str, parts: dict[str, list[str]], call: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        check_trainable(_index(tmp_path, class_name, **parts), call)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no readable model_index.json .* whole diffusers pipeline"):
        PipelineFolder.read(str(tmp_path))


def test_a_folder_whose_weights_are_missing_is_refused(folder: PipelineFolder, tmp_path: Path) -> None:
    part = tmp_path / "transformer"
    part.mkdir()
    (part / "config.json").write_bytes((folder.path / "transformer" / "config.json").read_bytes())
    (tmp_path / "model_index.json").write_bytes((folder.path / "model_index.json").read_bytes())
    with pytest.raises(ValueError, match=r"cannot be loaded .* as safetensors"):
        PipelineFolder.read(str(tmp_path)).load(
            dtype=torch.float32, device="cpu", without=("vae", "text_encoder", "tokenizer", "scheduler")
        )


def test_embeddings_have_the_names_of_the_pipeline_s_arguments() -> None:
    both = (
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    assert embedding_names(FluxPipeline) == both
    assert set(embedding_names(StableDiffusion3Pipeline)) == set(both)
    masks = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    assert set(embedding_names(QwenImagePipeline)) == {both[0], both[2], *masks}
    # It encodes a prompt by two encoders with one method: which is whose cannot be told.
    assert embedding_names(HunyuanDiTPipeline) == ()


CALL = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "guidance_scale": 3.0, "output_type": "pt"}


def test_a_pipeline_without_encoders_draws_the_same_from_what_is_stored(
    folder: PipelineFolder, tmp_path: Path
) -> None:
    encoders = folder.load_encoders(dtype=torch.float32, device="cpu")
    assert encoders.transformer is None and encoders.vae is None
    encoder = PipelinePromptEncoder(encoders, negative_prompt="a dog", max_sequence_length=16)
    store = _stored(tmp_path, {text: encoder.encode(text) for text in ("a red cat", "the moon")})
    denoiser = folder.load_denoiser(dtype=torch.float32, device="cpu", embedded=True)
    assert denoiser.text_encoder is None and denoiser.tokenizer is None and denoiser.vae is not None
    row = store[1]
    assert isinstance(row, dict)

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    images = denoiser(**row, **CALL, generator=noise())[0]
    own = {"prompt": "the moon", "negative_prompt": "a dog", "max_sequence_length": 16}
    assert torch.equal(images, make_pipeline()(**own, **CALL, generator=noise())[0])


def _stored(folder: Path, rows: dict[str, Any], *, rows_per_part: int = 10) -> EmbeddingStore:
    places = list(rows.items())
    (folder / part_path("")).parent.mkdir(parents=True)
    parts = []
    for first in range(0, len(places), rows_per_part):
        of_part = places[first : first + rows_per_part]
        (folder / part_path(f"part-{first}")).write_bytes(embeddings_part(of_part))
        parts.append([f"part-{first}", len(of_part)])
    names = sorted({name for row in rows.values() for name in row})
    manifest = EmbeddingManifest(
        pipeline={},
        dtype="float32",
        max_sequence_length=0,
        negative_prompt="",
        names=names,
        count=len(rows),
        parts=parts,
    )
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest)))
    return EmbeddingStore(folder)


def _row(seed: int, negative: int) -> dict[str, Tensor | list[Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": [torch.randn(seed + 1, 4, generator=made)],
        "pooled_prompt_embeds": torch.randn(1, 4, generator=made).bfloat16(),
        "prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool),
        "negative_prompt_embeds": torch.full((1, 3), float(negative)),
    }


def test_a_store_hands_out_each_row_as_it_was_given(tmp_path: Path) -> None:
    rows = {f"prompt {i}": _row(i, negative=i // 4) for i in range(7)}
    store = _stored(tmp_path, rows, rows_per_part=3)
    for again in (store, pickle.loads(pickle.dumps(store))):
        assert len(again) == 7
        for place, (text, row) in enumerate(rows.items()):
            assert again.text(place) == text
            found = again[place]
            assert isinstance(found, dict) and found.keys() == row.keys()
            torch.testing.assert_close(dict(found), row, rtol=0, atol=0)
    with pytest.raises(IndexError, match="has no row 7"):
        store[7]


def test_a_pipeline_that_takes_no_embeddings_is_given_texts(tmp_path: Path) -> None:
    assert _stored(tmp_path, {"a cat": {}, "a dog": {}})[0:2] == ["a cat", "a dog"]


def test_a_store_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert read_embedding_manifest(str(tmp_path)) is None
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="no embeddings of a diffusers pipeline"):
        EmbeddingStore(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": "pipeline-1"}))
    with pytest.raises(ValueError, match=r"has a .* of other fields \(.*missing"):
        read_embedding_manifest(str(tmp_path))


def test_a_mask_that_a_pipeline_leaves_out_is_stored_whole() -> None:
    class Masked(QwenImagePipeline):
        def __init__(self) -> None:
            self._own = SimpleNamespace()

        _execution_device = torch.device("cpu")

        def encode_prompt(self, prompt: list[str], device: Any = None) -> tuple[Tensor, None]:
            return torch.zeros(1, len(prompt[0]), 4), None

    found = PipelinePromptEncoder(Masked(), negative_prompt="abc").encode("ab")
    assert {name: tuple(value.shape) for name, value in found.items() if isinstance(value, Tensor)} == {
        "prompt_embeds": (1, 2, 4),
        "prompt_embeds_mask": (1, 2),
        "negative_prompt_embeds": (1, 3, 4),
        "negative_prompt_embeds_mask": (1, 3),
    }


def test_prompts_of_other_lengths_make_a_batch_where_they_have_masks() -> None:
    case = make_case("qwen")
    rows = [
        {
            name: value[:1, :length] if isinstance(value, Tensor) else value
            for name, value in case.call.items()
        }
        for length in (3, 5)
    ]
    rows = [{name: value for name, value in row.items() if isinstance(value, Tensor)} for row in rows]
    call = {name: value for name, value in case.call.items() if not isinstance(value, Tensor)}
    call["num_inference_steps"] = 2

    def latents(prompts: list[dict[str, Any]], names: list[int]) -> Tensor:
        return sample_pipeline(case.pipe, call, prompts, names, seed=0)

    both = latents(rows, [0, 1])
    for place, row in enumerate(rows):
        torch.testing.assert_close(both[place : place + 1], latents([row], [place]), rtol=0, atol=1e-5)
    assert not torch.allclose(both[:1], latents(rows[:1], [1]), atol=1e-2), "each row has its own noise"
