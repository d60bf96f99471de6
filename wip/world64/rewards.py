"""Rewards: how well frames, or clips, fit a caption, word by word, and how good they look

R = sum over the caption's words of log p(word | words of its kind) + logit of the grade.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grading import CLASSES
from nets import Residual
from world import KINDS, MOTIONS, WHERE


def parse(text: str) -> tuple:
    "Noun, colour, scene and motion of a caption; the inverse of `world.caption`"
    words = text.split()
    of = lambda kind: next(i for i, w in enumerate(KINDS[kind]) if w in words)
    scene = next(i for i, where in enumerate(WHERE) if text.endswith(where))
    return of(0), of(1), scene, next(i for i, w in enumerate(MOTIONS) if w in words)


class Tower(nn.Module):
    "Frames `(n 3 64 64)` in [0,1] to maps `(n out 8 8)`"
    def __init__(self, width: int = 24, out: int = 64):
        super().__init__()
        sizes = (3, width, 2 * width, 2 * width, out)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1)
                                   for i, o, s in zip(sizes, sizes[1:], (2, 2, 1, 2)))
        self.norms = nn.ModuleList(nn.GroupNorm(4, o) for o in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        return x


def pooled(x: Tensor) -> Tensor:
    "Mean and maximum over everything but clips and channels"
    return torch.cat([x.flatten(2).mean(2), x.flatten(2).amax(2)], 1)


def head(n: int, out: int) -> nn.Sequential:
    "A small classifier"
    return nn.Sequential(nn.Linear(n, 96), nn.SiLU(), nn.Linear(96, out))


class ImageReward(nn.Module):
    "Sees single frames: noun, colour, scene and look"
    kinds, split = (0, 1, 2), (*CLASSES[:3], 1)

    def __init__(self):
        super().__init__()
        self.tower, self.head = Tower(), head(128, sum(self.split))

    def heads(self, frames: Tensor) -> tuple:
        "Logits of every kind of word and of the grade, of frames `(n 3 64 64)`"
        return self.head(pooled(self.tower(frames))).split(self.split, 1)

    def forward(self, clips: Tensor, captions: list[str]) -> Tensor:
        "R of `(b 3 t 64 64)`, the mean over frames `(b,)`"
        t = clips.shape[2]
        heads = self.heads(clips.transpose(1, 2).flatten(0, 1))
        return word_score(heads, captions, self.kinds, t).unflatten(0, (-1, t)).mean(1)


class VideoReward(nn.Module):
    "Sees clips: frames through a tower, then convolutions in time and space"
    kinds, split = (0, 1, 2, 3), (*CLASSES, 1)

    def __init__(self):
        super().__init__()
        self.tower = Tower()
        self.convs = nn.ModuleList(nn.Conv3d(64, 64, 3, s, 1) for s in (1, (1, 2, 2)))
        self.norms = nn.ModuleList(nn.GroupNorm(4, 64) for _ in range(2))
        self.head = head(128, sum(self.split))

    def heads(self, clips: Tensor) -> tuple:
        "Logits of every kind of word and of the grade, of clips `(b 3 t 64 64)`"
        h = self.tower(clips.transpose(1, 2).flatten(0, 1))
        h = h.unflatten(0, (len(clips), -1)).transpose(1, 2)
        h = h + F.silu(self.norms[0](self.convs[0](h)))
        return self.head(pooled(F.silu(self.norms[1](self.convs[1](h))))).split(self.split, 1)

    def forward(self, clips: Tensor, captions: list[str]) -> Tensor:
        return word_score(self.heads(clips), captions, self.kinds)


class TubeReward(nn.Module):
    "Sees clips in another way: tubes of 2 frames and 8 x 8 pixels, and attention among them"
    kinds, split = (0, 1, 2, 3), (*CLASSES, 1)

    def __init__(self, width: int = 96, layers: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(24, 32, 3, 2, 1), nn.GELU(),
                                  Residual(32), nn.GELU(), nn.Conv2d(32, width, 3, 2, 1))
        self.place = nn.Parameter(.02 * torch.randn(64, width))
        self.when = nn.Parameter(.02 * torch.randn(4, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0., F.gelu, batch_first=True,
                                       norm_first=True) for _ in range(layers))
        self.head = head(2 * width, sum(self.split))

    def heads(self, clips: Tensor) -> tuple:
        "Logits of every kind of word and of the grade, of clips `(b 3 8 64 64)`"
        tubes = clips.transpose(1, 2).unflatten(1, (4, 2)).flatten(2, 3).flatten(0, 1) * 2 - 1
        x = self.stem(tubes).flatten(2).transpose(1, 2) + self.place
        x = (x.unflatten(0, (len(clips), 4)) + self.when[:, None]).flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(pooled(x.transpose(1, 2))).split(self.split, 1)

    def forward(self, clips: Tensor, captions: list[str]) -> Tensor:
        return word_score(self.heads(clips), captions, self.kinds)


def word_score(heads: tuple, captions: list[str], kinds: tuple, repeat: int = 1) -> Tensor:
    "Sum of the log-probabilities of the caption's words, plus the logit of the grade"
    want = torch.tensor([parse(c) for c in captions]).repeat_interleave(repeat, 0)
    logs = (heads[k].log_softmax(1).gather(1, want[:, k:k + 1])[:, 0] for k in kinds)
    return sum(logs) + heads[-1][:, 0]


def jittered(clips: Tensor, gen: torch.Generator, noise: float = .05, shift: int = 3,
             light: float = .1) -> Tensor:
    "Move all clips by a few pixels, add noise, change brightness and contrast: against hacking"
    dy, dx = (int(v) for v in torch.randint(2 * shift + 1, (2,), generator=gen))
    x = F.pad(clips.flatten(1, 2), (shift,) * 4, mode="replicate")
    x = x[..., dy:dy + clips.shape[-2], dx:dx + clips.shape[-1]].view(clips.shape)
    a, b, c = torch.rand(3, len(x), 1, 1, 1, 1, generator=gen)
    x = (x - .5) * (1 + light * (2 * a - 1)) + .5 + light * (b - .5)
    return x + noise * c * torch.randn(x.shape, generator=gen)
