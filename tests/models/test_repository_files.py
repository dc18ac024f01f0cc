"""Which files of a repository are read: of which parts, in which precision and format."""

import json

import pytest

from harmonica.io.repository_files import (
    ENCODER_STEMS,
    MODEL_STEMS,
    Weights,
    bare_checkpoint,
    choose_weights,
    wanted,
)

STEM = MODEL_STEMS[0]
CLASS_INDEX = {
    "_class_name": "DiTPipeline",
    "id2label": {"0": "tench"},
    "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TEXT_INDEX = CLASS_INDEX | {
    "_class_name": "PixArtAlphaPipeline",
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "safety_checker": [None, None],
}


def shards(variant: str = "", count: int = 2, form: str = "safetensors", stem: str = STEM) -> list[str]:
    """As diffusers and transformers name them, and their index."""
    dot = f".{variant}" if variant else ""
    files = [f"{stem}{dot}-0000{i + 1}-of-0000{count}.{form}" for i in range(count)]
    return [*files, f"{stem}.{form}.index{dot}.json"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([f"{STEM}.safetensors", f"{STEM}.bin"], Weights((f"{STEM}.safetensors",))),
        ([f"{STEM}.bin"], Weights((f"{STEM}.bin",))),
        ([f"{STEM}.fp16.safetensors"], Weights((f"{STEM}.fp16.safetensors",), variant="fp16")),
        (
            [f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"],
            Weights((f"{STEM}.bf16.safetensors",), variant="bf16"),
        ),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], Weights((f"{STEM}.safetensors",))),
        # Its values, not its format, are what a router knows a model by.
        ([f"{STEM}.bin", f"{STEM}.fp16.safetensors"], Weights((f"{STEM}.bin",))),
        (shards(), Weights(tuple(shards()[:2]), shards()[2])),
        (shards("fp16"), Weights(tuple(shards("fp16")[:2]), shards("fp16")[2], "fp16")),
        ([*shards("fp16"), *shards()], Weights(tuple(shards()[:2]), shards()[2])),
        (
            [*shards("bf16"), *shards(form="bin")],
            Weights(tuple(shards(form="bin")[:2]), shards(form="bin")[2]),
        ),
        (shards()[:2], None),  # nothing says what is in which
        (shards()[2:], None),
        ([f"{STEM}.non_ema.safetensors", "model.safetensors", "config.json"], None),
        # The older way: variant behind the number, and before the index.
        (
            [f"{STEM}-00001-of-00001.fp16.safetensors", f"{STEM}.safetensors.fp16.index.json"],
            Weights(
                (f"{STEM}-00001-of-00001.fp16.safetensors",), f"{STEM}.safetensors.fp16.index.json", "fp16"
            ),
        ),
    ],
)
def test_full_precision_comes_first_then_safetensors_then_whole_files(
    names: list[str], chosen: Weights | None
) -> None:
    assert choose_weights(names, MODEL_STEMS) == chosen
    assert choose_weights(reversed(names), MODEL_STEMS) == chosen


def test_a_text_encoder_s_files_have_their_own_names() -> None:
    assert choose_weights(["model.safetensors", "pytorch_model.bin"], ENCODER_STEMS) == Weights(
        ("model.safetensors",)
    )
    bin_shards = shards(form="bin", stem="pytorch_model")
    assert choose_weights(bin_shards, ENCODER_STEMS) == Weights(tuple(bin_shards[:2]), bin_shards[2])
    assert not choose_weights(bin_shards, ENCODER_STEMS).is_safe  # type: ignore[union-attr]


NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    f"transformer/{STEM}.safetensors",
    "vae/config.json",
    f"vae/{STEM}.safetensors",
]
WORDS = [f"tokenizer/{name}" for name in ("added_tokens.json", "spiece.model", "tokenizer_config.json")]
ENCODER = ["text_encoder/config.json", *(f"text_encoder/{name}" for name in shards(stem="model"))]
UNNEEDED = [
    "README.md",
    ".gitattributes",
    "config.json",
    "PixArt-XL-2-512x512.pth",
    "assets/picture.png",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "unet/config.json",
    f"transformer/{STEM}.bin",
    f"transformer/{STEM}.fp16.safetensors",
    f"transformer/old/{STEM}.safetensors",
    f"transformer/{STEM}.safetensors.index.fp16.json",
    "text_encoder/model.fp16.safetensors",
    "tokenizer/README.md",
]


def of(names: list[str], index: object = None) -> list[str]:
    return wanted(names, lambda name: json.dumps(index).encode(), "model.path x")


@pytest.mark.parametrize(
    ("index", "needed"), [(CLASS_INDEX, NEEDED), (TEXT_INDEX, [*NEEDED, *WORDS, *ENCODER])]
)
def test_a_pipeline_s_files_are_those_of_the_parts_that_its_index_lists(
    index: dict[str, object], needed: list[str]
) -> None:
    assert of([*NEEDED, *WORDS, *ENCODER, *UNNEEDED], index) == sorted(needed)
    left_out = index | {"vae": [None, None]}
    assert of([*NEEDED, *WORDS, *ENCODER], left_out) == sorted(n for n in needed if not n.startswith("vae/"))


def test_parts_of_any_pipeline_are_read_as_its_index_lists_them() -> None:
    """As FLUX, Wan 2.2 and Qwen-Image-Edit have them."""
    index = CLASS_INDEX | {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "processor": ["transformers", "Qwen2VLProcessor"],
        "feature_extractor": [None, None],
        "safety_checker": ["transformers", "Checker"],
        "boundary_ratio": 0.9,
    }
    needed = [
        *NEEDED,
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "processor/chat_template.jinja",
        "processor/preprocessor_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        *(name.replace("text_encoder", "text_encoder_2") for name in ENCODER),
        "tokenizer_2/spiece.model",
        "transformer_2/config.json",
        f"transformer_2/{STEM}.safetensors",
    ]
    unneeded = [*UNNEEDED, "feature_extractor/preprocessor_config.json", "processor/model.safetensors"]
    assert of([*needed, *unneeded], index) == sorted(needed)


def test_without_an_index_it_is_a_part_or_our_own_folder_or_a_checkpoint() -> None:
    assert of(["config.json", f"{STEM}.safetensors", "README.md"]) == ["config.json", f"{STEM}.safetensors"]
    assert of(["config.json", "model.safetensors", "model.pt"]) == ["config.json", "model.safetensors"]
    assert of(["config.json", "model.pt", "other.pt"]) == ["config.json", "model.pt"]
    assert of([name for name in NEEDED if name != "model_index.json"]) == NEEDED[1:]
    assert of(["DiT.pt", "DiT.safetensors", "notes.txt"]) == ["DiT.safetensors"]
    assert of(["notes.txt"]) == []


def test_of_several_checkpoints_none_is_guessed() -> None:
    with pytest.raises(
        ValueError, match=r"model.path x has no config.json and several checkpoints, a.pt, b.ckpt"
    ):
        of(["a.pt", "b.ckpt"])
    assert bare_checkpoint(["sub/a.pt", "b.pth"], "x") == "b.pth"


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"{", "cannot be read"), (b"[]", "holds no JSON object"), (b"\xff", "cannot be read")],
)
def test_a_broken_index_is_named(text: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=rf"model.path x: model_index.json {words}.*: fetch it again"):
        wanted(["model_index.json"], lambda name: text, "model.path x")
