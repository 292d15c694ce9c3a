"""Structural similarity of generated images and their originals (Wang et al. 2004)."""

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_tdisent.metrics.metric import Column, Pair, PairedMetric


class SSIM(PairedMetric):
    """SSIM (Wang et al. 2004, eq. 13) as torchmetrics computes it, averaged over images.

    In a Gaussian window of 11 x 11 and deviation 1.5, edges reflected; see `ssim_sigma` for images below 11 pixels.
    """

    name = "ssim"
    asked_by = "computed for every conditional model"
    columns = (Column("ssim", "structural similarity", "higher", with_features=False),)

    def of_images(self, pair: Pair) -> Tensor:
        """Return the similarity of each image, float64 (B,)."""
        x, x0 = pair.images.double(), pair.originals.double()
        sigma = ssim_sigma(min(x.shape[2:]))
        return structural_similarity_index_measure(x, x0, sigma=sigma, reduction="none", data_range=255.0)  # type: ignore[return-value]


def ssim_sigma(side: int) -> float:
    """Return the deviation of SSIM's window: 1.5 from 11 pixels on, else that of the largest odd window that fits.

    torchmetrics has no argument for the size of a Gaussian window but cuts it at 3.5 deviations: a smaller one has a
    smaller deviation. 11 x 11 on 8 pixels would see more reflections than image, and below 6 pixels there are not
    enough to reflect.
    """
    return 1.5 if side >= 11 else max((side - 1) // 2 / 3.5, 0.1)
