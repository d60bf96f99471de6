"""Networks of the world: a video autoencoder, a text encoder and a denoiser"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world import WORDS

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
        b = len(z)
        z = z.transpose(1, 2).flatten(0, 1) * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        x = (self.raw_decode(z) / 2 + .5).clamp(0, 1)
        return x.unflatten(0, (b, -1)).transpose(1, 2)


def _linear(layer, x):
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ---- text ----------------------------------------------------------------------------

WIDTH_TEXT, LONGEST = 96, 9   # size of a word's vector; most words of a caption


def tokens(captions: list[str]) -> Tensor:
    "Numbers of words `(b 9)`, 0 where a caption has ended; an empty caption is all 0"
    number = {word: i + 1 for i, word in enumerate(WORDS)}
    rows = [[number[w] for w in c.split()] for c in captions]
    return torch.tensor([r + [0] * (LONGEST - len(r)) for r in rows])


class TextEncoder(nn.Module):
    "A learned vector for each word; the word 0 is 'nothing' and is learned too"
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH_TEXT)

    def forward(self, ids: Tensor) -> Tensor:
        "Word vectors `(b 9 96)`"
        return self.words(ids)


# ---- denoiser ------------------------------------------------------------------------

def sinusoid(t: Tensor, width: int = 64) -> Tensor:
    "Fourier features `(b width)` of times in [0,1]"
    rates = math.tau * torch.logspace(-1, 1.5, width // 2, device=t.device)
    angle = t[:, None] * rates
    return torch.cat([angle.cos(), angle.sin()], 1)


def relative_places(frames: int = 8, side: int = 4) -> Tensor:
    "For each pair of patches, the number of their offset in time, rows and columns `(128 128)`"
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(side), torch.arange(side))
    offset = places[:, None] - places + torch.tensor((frames - 1, side - 1, side - 1))
    wide = 2 * side - 1
    return (offset[..., 0] * wide + offset[..., 1]) * wide + offset[..., 2]


class Block(nn.Module):
    "Attention among all patches, then a feed-forward part, both shifted, scaled and gated"
    def __init__(self, width: int, heads: int, hidden: int, cond: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.modulate = _zero(nn.Linear(cond, 6 * width))
        self.near = nn.Parameter(torch.zeros(heads, 15 * 7 * 7))   # one weight for each offset

    def forward(self, x: Tensor, c: Tensor, offsets: Tensor) -> Tensor:
        a, b, g, d, e, h = self.modulate(c).repeat_interleave(16, 1).chunk(6, -1)
        x = x + g * self.attend(_shifted(x, a, b), offsets)
        return x + h * self.down(F.relu(self.up(_shifted(x, d, e))).square())

    def attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        "Attention with unit queries and keys, and a learned liking for offsets"
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))
        near = self.near.to(q.dtype)[:, offsets]
        weights = (q @ (k * q.shape[-1]**-.5).transpose(-1, -2) + near).softmax(-1)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def _shifted(x, scale, shift):
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class VideoNet(nn.Module):
    """Predict the v of a variance-preserving process, cos(phi) noise - sin(phi) latents

    A transformer over patches of 2 x 2, then two convolutions, zero at the start, that mend what
    neighbouring patches do not agree on. diffusion.py reads it as a flow teacher or a VP teacher.
    """
    def __init__(self, width: int = 192, layers: int = 6, heads: int = 6, hidden: int = 768,
                 cond: int = 96, mending: int = 48):
        super().__init__()
        self.patch_in = nn.Linear(4 * CHANNELS, width)
        self.place = nn.Parameter(.1 * torch.randn(16, width))
        self.frame = nn.Parameter(.1 * torch.randn(8, 1, width))
        self.moment = nn.Parameter(torch.zeros(8, cond))   # words act on each frame in its own way
        self.time = nn.Sequential(nn.Linear(64, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.text = nn.Sequential(nn.Linear(WIDTH_TEXT, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(cond, cond), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads, hidden, cond) for _ in range(layers))
        self.last = _zero(nn.Linear(cond, 2 * width))
        self.patch_out = _zero(nn.Linear(width, 4 * CHANNELS))
        self.fine = nn.Conv2d(2 * CHANNELS, mending, 3, padding=1)
        self.tone = _zero(nn.Linear(cond, mending))
        self.end = _zero(nn.Conv2d(mending, CHANNELS, 3, padding=1))
        self.register_buffer("offsets", relative_places(), persistent=False)

    def forward(self, z: Tensor, phi: Tensor, context: Tensor, at: Tensor | None = None) -> Tensor:
        """Latents of unit variance `(b 16 t 8 8)`, angles `(b,)` in [0, pi/2], words `(b n 96)`

        A clip has 8 frames; a single frame (t = 1) may be one of them, number `at` `(b,)`.
        """
        b, _, t = z.shape[:3]
        when = self.frame if at is None else self.frame[at][:, None]
        offsets = self.offsets[:16 * t, :16 * t]
        c = self.time(sinusoid(phi * 2 / math.pi)) + self.text(context.sum(1))
        c = self.mix(c[:, None] + (self.moment if at is None else self.moment[at][:, None]))
        frames = z.transpose(1, 2).flatten(0, 1)
        x = F.pixel_unshuffle(frames, 2).flatten(2).transpose(1, 2)           # (b t) 16 64
        x = (self.patch_in(x).unflatten(0, (b, t)) + self.place + when).flatten(1, 2)
        for block in self.blocks:
            x = block(x, c, offsets)
        x = self.patch_out(_shifted(x, *self.last(c).repeat_interleave(16, 1).chunk(2, -1)))
        x = x.view(b * t, 16, -1).transpose(1, 2).unflatten(2, (4, 4))
        x = F.pixel_shuffle(x, 2)
        tone = (1 + self.tone(c)).flatten(0, 1)[..., None, None]
        x = x + self.end(F.silu(self.fine(torch.cat([frames, x], 1)) * tone))
        return x.unflatten(0, (b, t)).transpose(1, 2).float()
