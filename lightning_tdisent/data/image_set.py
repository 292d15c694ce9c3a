"""`ImageSet`: decoded images in memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sample = dict[str, Any]


def mirrored(images: Tensor, flip: Tensor | None) -> Tensor:
    """Return the images, those with ``flip`` mirrored.

    Of latents (B, 2, 2, C, h, w), return (B, 2, C, h, w): those that were encoded from the original or mirrored image.
    """
    if images.ndim == 6:
        return images[torch.arange(len(images), device=images.device), 0 if flip is None else flip.long()]
    return images if flip is None else torch.where(flip[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images uint8 (N, C, H, W) with labels int64 (N,), and the digest of the shards they came from.

    ``images`` may also be latents, float16 (N, 2, 2, C, h, w): [original, flipped] x [mean, standard deviation].
    """

    images: Tensor
    labels: Tensor
    digest: str
    captions: tuple[str, ...] | None = None
    numbers: Tensor | None = None  # positions in the split, if samples were left out or spread

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: Tensor, flip: Tensor | None = None) -> Sample:
        """Return these images as a batch, in the format of `Shards.collate`."""
        kind = "latent" if self.images.ndim == 6 else "image"
        out = {kind: mirrored(self.images[numbers], flip), "label": self.labels[numbers]}
        out["id"] = numbers if self.numbers is None else self.numbers[numbers]
        if self.captions is not None:
            out["caption"] = [self.captions[n] for n in numbers.tolist()]  # type: ignore[assignment]
        return out

    def to(self, device: torch.device) -> "ImageSet":
        """Return the same images on a device."""
        numbers = self.numbers if self.numbers is None else self.numbers.to(device)
        return ImageSet(self.images.to(device), self.labels.to(device), self.digest, self.captions, numbers)
