"""A T5 small enough for any test, in the form of a PixArt pipeline's folder, and prompts for it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from harmonica.data.prompt_files import MANIFEST, Manifest, PromptRows, part_bytes, part_path
from harmonica.data.prompts import PromptStore
from harmonica.data.text_encoder import TextEncoder
from harmonica.torchvision_ops import ensure_torchvision_imports

ensure_torchvision_imports()

from transformers import T5Config, T5EncoderModel, T5Tokenizer  # noqa: E402

WIDTH, TOKENS = 10, 7
"""As `tiny_pixart` has them."""
WORDS = ("a", "red", "blue", "green", "cat", "dog", "moon", "photo", "of", "the", "on", "under", "near")
LONG = "a red cat on the moon near a blue dog"  # ten tokens and the end
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def make_tokenizer(words: Sequence[str] = WORDS) -> T5Tokenizer:
    """One token a word; words that it does not have are spelled."""
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    pieces = [(f"▁{word}", -1.0) for word in words] + [("▁", -2.0)]
    return T5Tokenizer(vocab=special + pieces + [(letter, -5.0) for letter in _LETTERS], extra_ids=2)


def write_sentencepiece(folder: Path) -> None:
    """The same tokens in the older form alone, as PixArt's repositories have it: no `tokenizer.json`."""
    import sentencepiece

    (folder / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*make_prompts(20), "a photo of the moon", _LETTERS]),
        model_prefix=str(folder / "spiece"),
        vocab_size=len(make_tokenizer()) - 2,  # and two extra ids
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()


def make_encoder(*, width: int = WIDTH, seed: int = 0) -> T5EncoderModel:
    """Two layers; position and neighbours matter, so that each token's embedding is its own."""
    torch.manual_seed(seed)
    config = T5Config(
        d_model=width,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        vocab_size=len(make_tokenizer()),
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def write_text_folder(folder: Path, *, width: int = WIDTH, seed: int = 0) -> Path:
    """`tokenizer/` and `text_encoder/`."""
    make_tokenizer().save_pretrained(folder / "tokenizer")
    make_encoder(width=width, seed=seed).save_pretrained(folder / "text_encoder")
    return folder


def make_prompts(count: int) -> list[str]:
    """Distinct, preprocessed, of three tokens and more."""
    colours, animals, places = ("red", "blue", "green"), ("cat", "dog", "moon"), ("on", "under", "near")
    made = [
        " ".join(filter(None, (colours[i % 3], animals[i // 3 % 3], places[i // 9 % 3] * (i % 2), str(i))))
        for i in range(count)
    ]
    assert len(set(made)) == count
    return made


def write_store(
    folder: Path, encoder: TextEncoder, prompts: list[str], *, rows_per_part: int = 4
) -> PromptStore:
    """A finished store, without the pipeline: all prompts are embedded together."""
    rows = PromptRows(*encoder.encode(prompts, TOKENS), prompts)
    negative = PromptRows(*encoder.encode([""], TOKENS), [""])
    (folder / part_path("")).parent.mkdir(parents=True)
    parts = []
    for first in range(0, len(prompts), rows_per_part):
        of_part = PromptRows(*(each[first : first + rows_per_part] for each in rows))
        (folder / part_path(f"part-{first}")).write_bytes(part_bytes([of_part]))
        parts.append([f"part-{first}", len(of_part.prompts)])
    (folder / part_path("negative")).write_bytes(part_bytes([negative]))
    manifest = Manifest(
        encoder=encoder.identity(TOKENS),
        dtype=str(rows.embeddings.dtype).removeprefix("torch."),
        max_tokens=TOKENS,
        width=encoder.width,
        count=len(prompts),
        tokens=int(rows.mask.sum()),
        truncated=0,
        parts=parts,
        negative="negative",
    )
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest)))
    return PromptStore(folder)
