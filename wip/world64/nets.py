"""Networks of the world: a video autoencoder, a text encoder and a denoiser"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world import COLOURS, KINDS, MOTIONS, NOUNS, SCENES, WORDS

CHANNELS, SIDE, PATCH = 16, 8, 8  # latent channels, latent side, pixels of a patch's side


class Residual(nn.Module):
    "Two convolutions beside an identity, which they are at the start"
    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        _zero(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.silu(self.a(F.silu(x))))


def _zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchVAE(nn.Module):
    """Frames to latents at factor 8: a linear patch transform, started from PCA, plus convolutions

    Encoder and decoder are each `linear(patch) + convolutions`; the convolutions start at zero.
    """
    def __init__(self, fine: int = 64, coarse: int = 96):
        super().__init__()
        self.analyse, self.synthesise = nn.Linear(192, CHANNELS), nn.Linear(CHANNELS, 192)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, fine, 3, 1, 1), Residual(fine), nn.SiLU(),
            nn.Conv2d(fine, coarse, 3, 2, 1), Residual(coarse), nn.SiLU(),
            _zero(nn.Conv2d(coarse, CHANNELS, 3, 1, 1)))
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, coarse, 3, 1, 1), Residual(coarse), Residual(coarse), nn.SiLU(),
            nn.Conv2d(coarse, 4 * fine, 3, 1, 1), nn.PixelShuffle(2), Residual(fine),
            Residual(fine), nn.SiLU(), _zero(nn.Conv2d(fine, 48, 3, 1, 1)), nn.PixelShuffle(4))
        self.register_buffer("mean", torch.zeros(CHANNELS))  # of the training clips' latents
        self.register_buffer("std", torch.ones(CHANNELS))

    @torch.no_grad()
    def start_from_pca(self, frames: Tensor) -> None:
        "Set the linear parts to the principal components of patches of `(n 3 64 64)` in [-1,1]"
        patches = F.pixel_unshuffle(frames, PATCH).permute(0, 2, 3, 1).reshape(-1, 192)
        mean = patches.mean(0)
        directions = torch.linalg.eigh((patches - mean).T @ (patches - mean))[1]
        directions = directions.flip(1)[:, :CHANNELS]
        scale = ((patches - mean) @ directions).std(0)
        self.analyse.weight.copy_(directions.T / scale[:, None])
        self.analyse.bias.copy_(-(mean @ directions) / scale)
        self.synthesise.weight.copy_(directions * scale)
        self.synthesise.bias.copy_(mean)

    def raw_encode(self, frames: Tensor) -> Tensor:
        "Latents before normalisation"
        return _linear(self.analyse, F.pixel_unshuffle(frames, PATCH)) + self.encoder(frames)

    def raw_decode(self, z: Tensor) -> Tensor:
        "Frames from latents before normalisation"
        return F.pixel_shuffle(_linear(self.synthesise, z), PATCH) + self.decoder(z)

    def encode(self, clips: Tensor) -> Tensor:
        "Normalised latents `(b 16 t 8 8)` of clips `(b 3 t 64 64)` in [0,1]"
        z = self.raw_encode(clips.transpose(1, 2).flatten(0, 1) * 2 - 1)
        z = (z - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        return z.unflatten(0, (len(clips), -1)).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        "Clips in [0,1] of normalised latents"
        frames = z.transpose(1, 2).flatten(0, 1) * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        x = (self.raw_decode(frames) / 2 + .5).clamp(0, 1)
        return x.unflatten(0, (len(z), -1)).transpose(1, 2)


def _linear(layer, x):
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
