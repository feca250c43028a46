"""Embeddings of images and texts, computed batch by batch."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from flava_train.data.wordpiece import WordPiece
from flava_train.evaluation.batches import EvaluationBatch
from flava_train.model.flava import Flava
from flava_train.shapes import Float, Int
from pmd_pipeline.contract.errors import PmdError


@dataclass(frozen=True)
class Embedder:
    """A model and a tokenizer that give unit vectors.

    Args:
        model: on the device where it computes.
        wordpiece: the tokenizer.
        caption_tokens: most tokens of a text.
        batch: texts at a time.
        autocast: type of the model's arithmetic; None for that of its weights.
    """

    model: Flava
    wordpiece: WordPiece
    caption_tokens: int
    batch: int
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.logit_scale.device

    def images_and_captions(
        self, batches: Iterable[EvaluationBatch]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], Int[Tensor, " m"]]:
        """Vectors of images and of captions, and the row of each caption's image."""
        images, texts, image_rows = [], [], []
        for batch in batches:
            images.append(self.images(batch.pixels))
            texts.append(self._embed_tokens(batch.tokens, batch.lengths))
            image_rows.append(batch.image_rows)
        if not images:
            raise PmdError("there is no held-out image to evaluate on")
        return torch.cat(images), torch.cat(texts), torch.cat(image_rows).to(self.device)

    def images(self, pixels: Tensor) -> Float[Tensor, "b d"]:
        """Unit vectors of uint8 images."""
        with self._precision():
            return self.model.embed_images(pixels.to(self.device)).float()

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit vectors of texts."""
        tokens, lengths = self.wordpiece.encode(texts, self.caption_tokens)
        return self._embed_tokens(torch.from_numpy(tokens), torch.from_numpy(lengths))

    def _embed_tokens(self, tokens: Int[Tensor, "b l"], lengths: Int[Tensor, " b"]) -> Tensor:
        vectors = []
        for rows in torch.arange(len(tokens)).split(self.batch):
            longest = int(lengths[rows].max())
            short = tokens[rows, :longest].to(self.device)
            with self._precision():
                vectors.append(self.model.embed_texts(short, lengths[rows].to(self.device)).float())
        return torch.cat(vectors)

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)
