"""The text encoder: it embeds as diffusers does, cuts or refuses, and is known by its weights."""

import pytest
import torch
from tiny_pipeline import make_vae
from tiny_pixart import pipeline_class
from tiny_text import LONG, TOKENS, WIDTH, WORDS, make_tokenizer, write_text_folder

from harmonica.data.text_encoder import TextEncoder, encoder_identity, preprocess


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "tokens"), [("alpha", None), ("sigma", None), ("sigma", TOKENS)])
def test_prompts_are_embedded_as_by_diffusers(folder, name, tokens, dtype):
    ours = TextEncoder.load(folder, dtype=dtype)
    pipe = pipeline_class(name)(
        tokenizer=ours.tokenizer, text_encoder=ours.model, vae=make_vae(), transformer=None, scheduler=None
    )
    limit = {} if tokens is None else {"max_sequence_length": tokens}
    prompts = ["A RED cat ", "\tblue\n", LONG]
    theirs, mask, negative, negative_mask = pipe.encode_prompt(prompts, device="cpu", **limit)
    max_tokens = tokens or {"alpha": 120, "sigma": 300}[name]
    assert [preprocess(prompt) for prompt in prompts] == pipe._text_preprocessing(prompts)
    for texts, expected, expected_mask in (
        (prompts, theirs, mask),
        (["", "", ""], negative, negative_mask),
    ):
        embeddings, found = ours.encode(texts, max_tokens)
        assert embeddings.shape == (3, max_tokens, WIDTH) and embeddings.dtype == getattr(torch, dtype)
        assert torch.equal(embeddings, expected) and torch.equal(found, expected_mask.bool())


def test_what_is_too_long_is_cut_with_one_warning_or_refused(encoder, caplog):
    fitting = "a red cat on the moon"  # six tokens and the end
    encoder.encode([fitting, "dog"], TOKENS, "refuse")
    assert not caplog.records
    _, mask = encoder.encode([fitting, LONG, f"{LONG} {LONG}"], TOKENS)
    assert mask.all()
    words = "2 of 3 prompts have more than 7 tokens, the first 11"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{words}; they lose their end"], "without a word of a prompt"
    cure = "shorten them, or set prompts.over_limit to truncate"
    with pytest.raises(ValueError, match=f"{words}: '{LONG}': {cure}"):
        encoder.encode([fitting, LONG, f"{LONG} {LONG}"], TOKENS, "refuse")
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        encoder.encode([], TOKENS)


def test_an_encoder_is_known_by_its_weights_and_tokenizer_however_they_are_stored(folder, encoder, tmp_path):
    ours = encoder.identity(TOKENS)
    assert ours == encoder_identity(folder, TOKENS)
    assert TextEncoder.load(folder, dtype="bfloat16").identity(TOKENS) == ours
    other = write_text_folder(tmp_path / "sharded")
    encoder.model.save_pretrained(other / "text_encoder", max_shard_size="2KB")
    (other / "text_encoder" / "model.safetensors").unlink()
    assert len(list((other / "text_encoder").glob("*.safetensors"))) > 1
    assert encoder_identity(other, TOKENS) == ours
    state = encoder.model.state_dict()
    bare = write_text_folder(tmp_path / "bare")
    (bare / "text_encoder" / "model.safetensors").unlink()
    torch.save(
        state | {"decoder.final_layer_norm.weight": torch.ones(2)}, bare / "text_encoder/pytorch_model.bin"
    )
    assert "encoder.embed_tokens.weight" in state and encoder_identity(bare, TOKENS) == ours

    def differing(identity):
        return [name for name in ours if identity[name] != ours[name]]

    assert differing(encoder.identity(9)) == ["max_tokens"]
    assert differing(encoder_identity(write_text_folder(tmp_path / "seed", seed=1), TOKENS)) == ["weights"]
    for words in (WORDS[:3], [word.replace("moon", "noon") for word in WORDS]):
        make_tokenizer(words).save_pretrained(other / "tokenizer")
        assert differing(encoder_identity(other, TOKENS)) == ["tokenizer"]


def without_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def of_another_kind(folder):
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "clip_text_model"}')


def without_tokenizer(folder):
    (folder / "tokenizer").rename(folder / "tokenizer_2")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_weights, "has no model.safetensors or pytorch_model.bin"),
        (of_another_kind, "has a text_encoder of type clip_text_model: give a PixArt's, a T5"),
        (without_tokenizer, "no tokenizer/tokenizer_config.json; it holds text_encoder, tokenizer_2: give"),
    ],
)
def test_a_folder_without_a_text_encoder_is_refused(tmp_path, spoil, words):
    spoil(write_text_folder(tmp_path))
    for load in (TextEncoder.load, lambda path: encoder_identity(path, TOKENS)):
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
