"""Text and pictures for a vision-language encoder, from its image processor and its tokenizer alone.

The processor classes of transformers do the same, but cannot be made where torchvision is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class ImageTextProcessor:
    """Stands in for a processor class: each image token of the text becomes one token a merged patch of its picture.

    image_token  the placeholder that a template holds once a picture
    """

    tokenizer: Any
    image_processor: Any
    image_token: str

    def __call__(
        self, text: Sequence[str], images: Image.Image | Sequence[Image.Image] | None = None, **tokenizing: Any
    ) -> Any:
        """``input_ids`` and ``attention_mask`` ``[B, L]``; of pictures also ``pixel_values`` and ``image_grid_thw``.

        ``tokenizing`` goes to the tokenizer (``padding``, ``return_tensors``). Raises ValueError where the texts hold
        other than one image token a picture.
        """
        with quiet_imports():
            from transformers import BatchFeature

        texts, pictures = list(text), {}
        if images is not None:
            pictures = dict(self.image_processor(images=images, return_tensors="pt"))
            texts = self._expanded(texts, pictures["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2)
        return BatchFeature({**self.tokenizer(texts, **tokenizing), **pictures})

    def _expanded(self, texts: Sequence[str], counts: Any) -> list[str]:
        pieces = [text.split(self.image_token) for text in texts]
        holes = sum(len(parts) - 1 for parts in pieces)
        if holes != len(counts):
            raise ValueError(f"the texts hold {holes} image tokens for {len(counts)} pictures")
        left = iter(counts.tolist())
        return [parts[0] + "".join(self.image_token * next(left) + part for part in parts[1:]) for parts in pieces]
