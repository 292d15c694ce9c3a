"""The U-Net of DDPM, implemented by diffusers."""

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.networks.network import Conditioning, Network, Nothing, Zero


class UNet(Network):
    """diffusers' `UNet2DModel` (2006.11239, appendix B), optionally class-conditional or time-agnostic.

    shape: (C, H, W) with H and W divisible by 2^(len(channels) - 1); channels: width of every resolution, high to low;
    layers: residual blocks per resolution; attention: resolutions (0 = full) with self-attention; mid_attention:
    self-attention between the two halves; head: channels per attention head; groups: groups of the normalisation, must
    divide every width; dropout: probability within residual blocks; classes, conditioning: see `Network`.
    """

    def __init__(
        self,
        shape: list[int],
        channels: list[int],
        layers: int = 2,
        attention: list[int] | None = None,
        mid_attention: bool = True,
        head: int = 8,
        groups: int = 8,
        dropout: float = 0.0,
        classes: int | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__(shape, classes, conditioning)
        check_number("groups", groups, 1, whole=True)
        check_number("dropout", dropout, 0, 1)
        self.channels, self.layers, self.attention = list(channels), layers, list(attention or [])
        self.mid_attention, self.head, self.groups, self.dropout = mid_attention, head, groups, dropout
        _, height, width = shape
        halvings = 2 ** (len(channels) - 1)
        if height % halvings or width % halvings:
            raise InputError(
                f"{height}x{width} cannot be halved to {len(channels)} resolutions; use sides divisible by {halvings}"
            )
        if any(c % groups for c in channels):
            raise InputError(f"groups: {groups} does not divide every width of channels: {channels}")
        if any(not 0 <= level < len(channels) for level in self.attention):
            raise InputError(f"attention: {attention} contains resolutions outside 0..{len(channels) - 1}")
        if (self.sees_state or classes is not None) and any(c == groups for c in channels):
            raise InputError(
                f"groups: {groups} with channels: {channels} makes groups of one channel, whose normalisation cancels "
                "the embedding of state and class; use fewer groups"
            )
        kind = ["Attn" if level in self.attention else "" for level in range(len(channels))]
        self.net = UNet2DModel(
            sample_size=(height, width),
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple(f"{k}DownBlock2D" for k in kind),
            up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kind)),
            add_attention=mid_attention,
            attention_head_dim=head,
            norm_num_groups=groups,
            dropout=dropout,
            num_class_embeds=None if classes is None else classes + 1,
        )
        if not self.sees_state:
            if classes is None:
                self.net.time_embedding = Nothing()
                for block in _blocks(self.net):
                    block.time_emb_proj = None
            else:
                self.net.time_embedding = Zero(4 * channels[0])

    @torch.no_grad()
    def at_time(self, time: float) -> Network:
        """See `Network.at_time`: the projected embedding is added to a bias, or with classes to each class vector."""
        other = self.time_agnostic().to(self.net.device, self.net.dtype)
        assert isinstance(other, UNet)
        state = other.state_dict()
        other.load_state_dict({k: v for k, v in self.state_dict().items() if k in state})
        t = self.net.time_proj(torch.tensor([time], device=self.net.device)).to(self.net.dtype)
        embedding = self.net.time_embedding(t)
        if self.classes is not None:
            other.net.class_embedding.weight += embedding
            return other
        for mine, theirs in zip(_blocks(self.net), _blocks(other.net), strict=True):
            theirs.conv1.bias += mine.time_emb_proj(silu(embedding))[0]
        return other

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """See `Network`."""
        out: Tensor = self.net(x, self.times(x, time), class_labels=self.labels(x, label), return_dict=False)[0]
        return out


def _blocks(net: nn.Module) -> list[ResnetBlock2D]:
    return [m for m in net.modules() if isinstance(m, ResnetBlock2D)]
