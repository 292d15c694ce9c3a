"""The diffusion transformer (DiT) of diffusers."""

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.nn.functional import silu

from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.networks.network import Bias, Conditioning, Network, Zero


class DiT(Network):
    """diffusers' `DiTTransformer2DModel` (2212.09748), optionally class-conditional or time-agnostic.

    shape: (C, H, W) with H = W, a multiple of ``patch``; patch: side of a patch in pixels; depth: number of blocks;
    heads, head: number of attention heads and channels per head; dropout: probability within blocks; classes,
    conditioning: see `Network`.

    A time-agnostic DiT keeps the class embedding; without classes the shifts, scales and gates of its normalisations
    are learned vectors.
    """

    def __init__(
        self,
        shape: list[int],
        patch: int = 2,
        depth: int = 6,
        heads: int = 4,
        head: int = 32,
        dropout: float = 0.0,
        classes: int | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__(shape, classes, conditioning)
        check_number("dropout", dropout, 0, 1)
        self.patch, self.depth, self.heads, self.head, self.dropout = patch, depth, heads, head, dropout
        channels, height, width = shape
        if height != width or height % patch:
            raise InputError(f"DiT needs square images whose side is a multiple of patch={patch}, got {height}x{width}")
        self.net = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=channels,
            out_channels=channels,
            num_layers=depth,
            dropout=dropout,
            sample_size=height,
            patch_size=patch,
            num_embeds_ada_norm=classes or 1,
        )
        inner = heads * head
        for block in self.net.transformer_blocks:
            embedding = block.norm1.emb
            embedding.class_embedder.dropout_prob = 0.0  # the training step drops labels, once per sample
            if not self.sees_state:
                embedding.timestep_embedder = Zero(inner)
            if classes is None:
                embedding.class_embedder = Zero(inner)
                if not self.sees_state:
                    block.norm1.linear = Bias(6 * inner)
        if classes is None and not self.sees_state:
            self.net.proj_out_1 = Bias(2 * inner)

    @torch.no_grad()
    def at_time(self, time: float) -> Network:
        """See `Network.at_time`: the time embedding is added to each class vector, or sets the learned vectors."""
        other = self.time_agnostic().to(self.net.device, self.net.dtype)
        assert isinstance(other, DiT)
        state = other.state_dict()
        other.load_state_dict({k: v for k, v in self.state_dict().items() if k in state})
        embeddings = []
        for mine, theirs in zip(self.net.transformer_blocks, other.net.transformer_blocks, strict=True):
            emb = mine.norm1.emb
            device = self.net.pos_embed.proj.weight.device
            t = emb.timestep_embedder(emb.time_proj(torch.tensor([time], device=device)).to(self.net.dtype))
            embeddings.append(t)
            if self.classes is not None:
                theirs.norm1.emb.class_embedder.embedding_table.weight += t
            else:
                theirs.norm1.linear.bias.copy_(mine.norm1.linear(silu(t))[0])
        if self.classes is None:
            other.net.proj_out_1.bias.copy_(self.net.proj_out_1(silu(embeddings[0]))[0])
        return other

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """See `Network`."""
        label = self.labels(x, label)
        if label is None:
            label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        out: Tensor = self.net(x, self.times(x, time), class_labels=label, return_dict=False)[0]
        return out
