"""Read stores of embedded prompts; training needs no text encoder then.

Row i is the i-th distinct prompt of the input, whichever worker embedded it and after however many retries.
The negative prompt "" is kept apart, so that no row is it. Padding comes back as zeros, which
differ from what the encoder has there, but nothing that heeds the mask can tell.
Shapes: N rows, S tokens of a padded prompt, C width of the text encoder.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from harmonica.data.prompt_files import MANIFEST, PromptRows, part_path, read_manifest
from harmonica.io.file_systems import open_uri
from harmonica.io.paths import shown
from harmonica.models.text_condition import TextCondition

_OPEN_PARTS = 16  # the footer of an open one takes some 170 bytes a row


class PromptStore:
    """Reads the rows of a finished store of embedded prompts by number.

    A pickled store holds the address alone, and opens the store again when it is loaded.
    """

    def __init__(self, uri: str | Path, digest: str = "") -> None:
        """Open a finished store.

        Args:
            uri: a local folder or an s3:// URI.
            digest: the digest that the store has to have, if given.

        Raises:
            ValueError: there is no store, or an unfinished one, or its digest is another.
        """
        self.uri = str(uri)
        manifest = read_manifest(self.uri)
        if manifest is None:
            raise ValueError(
                f"prompt store {self} has no {MANIFEST}: give a folder that "
                "pipelines.data.embed_prompts wrote, and run that again if it was interrupted"
            )
        if digest and digest != manifest.digest:
            raise ValueError(
                f"prompt store {self} is {manifest.digest} and was {digest}: keep each store in a folder of "
                "its own"
            )
        self.manifest = manifest
        self._filesystem, self._root = open_uri(self.uri, "prompt store")
        sizes = [rows for _, rows in manifest.parts]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._negative: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type["PromptStore"], tuple[str, str]]:
        return PromptStore, (self.uri, self.manifest.digest)

    def __str__(self) -> str:
        return shown(self.uri)

    def __len__(self) -> int:
        """Return the number of prompts, without the negative prompt."""
        return self.manifest.count

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row in memory: the padded embedding and its mask."""
        return self.manifest.max_tokens * (2 * self.manifest.width + 1)

    @property
    def mean_stored_bytes(self) -> float:
        """Return the mean bytes of a row's embedding on disk, without padding."""
        return 2 * self.manifest.width * self.manifest.tokens / self.manifest.count

    def check(
        self, model_width: int, max_tokens: int, encoder_identity: Mapping[str, Any] | None = None
    ) -> None:
        """Check that the store was made for a model.

        Args:
            model_width: of the embeddings that the model takes.
            max_tokens: what its prompts are padded to.
            encoder_identity: `text_encoder.encoder_identity` of its text encoder, where that is at hand.

        Raises:
            ValueError: the store is another model's; the message names what differs.
        """
        made = self.manifest
        pairs: list[tuple[str, Any, Any]] = [("width", made.width, model_width)]
        pairs += [("max_tokens", made.max_tokens, max_tokens)]
        pairs += [(name, made.encoder.get(name), its) for name, its in (encoder_identity or {}).items()]
        differing = {name: f"{name} {ours} and the model {its}" for name, ours, its in pairs if ours != its}
        if differing:
            raise ValueError(
                f"prompt store {self} has {', '.join(differing.values())}: embed the prompts with the "
                "model's own text encoder and number of tokens"
            )

    def row(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Return the embedding (S, C), the mask (S,) and the prompt of one row."""
        embeddings, mask, prompts = self.rows([index])
        return embeddings[0], mask[0], prompts[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> PromptRows:
        """Return rows in the order given.

        Embeddings (N, S, C) are bfloat16, with zeros at padding.

        Raises:
            ValueError: there is no such row, or its part is missing or damaged.
        """
        wanted = np.asarray(indices, np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise ValueError(f"prompt store {self} has no row {outside[0]}: give 0 to {len(self) - 1}")
        parts = np.searchsorted(self._ends, wanted, side="right")
        names = [self.manifest.parts[part][0] for part in parts]
        return self._read(list(zip(names, (wanted - self._starts[parts]).tolist())))

    def columns(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns `embedding` (N, S, C) and `mask` (N, S) bool of rows.

        Embeddings are int16, the bits of bfloat16, which numpy lacks.
        """
        embeddings, mask, _ = self.rows(indices)
        return {"embedding": embeddings.view(torch.int16).numpy(), "mask": mask.numpy()}

    def negative(self) -> tuple[Tensor, Tensor]:
        """Return the negative prompt's embedding (1, S, C) and mask (1, S), read once."""
        if self._negative is None:
            rows = self._read([(self.manifest.negative, 0)])
            self._negative = rows.embeddings, rows.mask
        return self._negative

    def _read(self, places: list[tuple[str, int]]) -> PromptRows:
        """Read the rows at places (part, row in it)."""
        shape = len(places), self.manifest.max_tokens, self.manifest.width
        bits_NSC, mask_NS, prompts = np.zeros(shape, np.int16), np.zeros(shape[:2], bool), []
        for n, (name, row) in enumerate(places):
            try:
                found = self._part(name).read_row_group(row)
                own_TC = np.frombuffer(found["embedding"][0].as_buffer(), np.int16).reshape(-1, shape[2])
                bits_NSC[n, : len(own_TC)] = own_TC
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ValueError(
                    f"prompt store {self} has no readable {part_path(name)} ({type(error).__name__}): delete "
                    "it and run pipelines.data.embed_prompts again, which makes what is missing"
                ) from None
            mask_NS[n, : found["tokens"][0].as_py()] = True
            prompts.append(found["prompt"][0].as_py())
        embeddings_NSC = torch.from_numpy(bits_NSC).view(torch.bfloat16)
        return PromptRows(embeddings_NSC, torch.from_numpy(mask_NS), prompts)

    def _part(self, name: str) -> pq.ParquetFile:
        if name not in self._open:
            source = self._filesystem.open_input_file(f"{self._root}/{part_path(name)}")
            self._open[name] = pq.ParquetFile(source, pre_buffer=True)
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        return self._open[name]


def text_condition(
    columns: Mapping[str, Any], store: PromptStore, pixels: tuple[int, int] | None = None
) -> TextCondition:
    """Return the model's condition from streamed rows with `PromptStore.columns`.

    Args:
        columns: numpy arrays, which Ray makes read-only, or torch tensors.
        pixels: height and width of the images, for a model that is conditioned on them.
    """
    bits, mask = (
        value if isinstance(value, Tensor) else torch.tensor(value)
        for value in (columns["embedding"], columns["mask"])
    )
    n, device = len(mask), mask.device
    negative, negative_mask = store.negative()
    sizes = {}
    if pixels is not None:
        height, width = map(float, pixels)
        sizes["resolution"] = torch.tensor([[height, width]], device=device).expand(n, -1)
        sizes["aspect_ratio"] = torch.full((n, 1), height / width, device=device)
    return TextCondition(
        embeddings=bits.view(torch.bfloat16),
        mask=mask,
        negative_embeddings=negative.to(device).expand(n, -1, -1),
        negative_mask=negative_mask.to(device).expand(n, -1),
        **sizes,
    )
