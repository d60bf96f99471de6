"""Judges: classifiers that share nothing with rewards, neither seeds nor architecture nor data"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grading import CLASSES

AXES = ("noun", "colour", "scene", "look", "motion", "steady")


class FrameJudge(nn.Module):
    "Sees single frames: noun, colour, scene, look"
    split = (*CLASSES[:3], 1)

    def __init__(self, width: int = 20):
        super().__init__()
        w = width
        self.convs = nn.ModuleList((nn.Conv2d(3, w, 5, 2, 2), nn.Conv2d(w, 2 * w, 3, 2, 1),
                                    nn.Conv2d(2 * w, 2 * w, 3, 1, 1),
                                    nn.Conv2d(2 * w, 3 * w, 3, 2, 1),
                                    nn.Conv2d(3 * w, 3 * w, 3, 1, 1)))
        self.norms = nn.ModuleList(nn.GroupNorm(4, c.out_channels) for c in self.convs)
        self.head = nn.Linear(6 * w, sum(self.split))

    def forward(self, frames: Tensor) -> tuple:
        "Logits of noun, colour, scene, look for frames `(n 3 64 64)` in [0,1]"
        x = frames - .5
        for conv, norm in zip(self.convs, self.norms):
            y = F.gelu(norm(conv(x)))
            x = x + y if y.shape == x.shape else y
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)).split(self.split, 1)


class ClipJudge(nn.Module):
    "Sees what changes in all eight frames at once, as channels: motion (or none), steadiness"
    split = (CLASSES[3], 1)

    def __init__(self, width: int = 32):
        super().__init__()
        w = width
        self.convs = nn.ModuleList((nn.Conv2d(27, w, 5, 2, 2), nn.Conv2d(w, 2 * w, 3, 2, 1),
                                    nn.Conv2d(2 * w, 2 * w, 3, 1, 1),
                                    nn.Conv2d(2 * w, 3 * w, 3, 2, 1)))
        self.norms = nn.ModuleList(nn.GroupNorm(4, c.out_channels) for c in self.convs)
        self.head = nn.Sequential(nn.Linear(6 * w, 64), nn.GELU(), nn.Linear(64, sum(self.split)))

    def forward(self, clips: Tensor) -> tuple:
        "Logits of motion and steadiness for clips `(b 3 8 64 64)` in [0,1]"
        mean = clips.mean(2, keepdim=True)
        x = torch.cat([2 * (clips - mean).transpose(1, 2).flatten(1, 2), mean[:, :, 0] - .5], 1)
        for conv, norm in zip(self.convs, self.norms):
            y = F.gelu(norm(conv(x)))
            x = x + y if y.shape == x.shape else y
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)).split(self.split, 1)


@torch.no_grad()
def judged(frame: FrameJudge, clip: ClipJudge, clips: Tensor, attrs: Tensor) -> Tensor:
    "Verdicts `(b 6)` on `AXES`: 1 or 0 for a word, 0..1 for look and steadiness"
    t = clips.shape[2]
    *words, look = (y.unflatten(0, (-1, t)) for y in frame(clips.transpose(1, 2).flatten(0, 1)))
    motion, steady = clip(clips)
    right = [(y.softmax(-1).mean(1).argmax(-1) == attrs[:, k]).float() for k, y in enumerate(words)]
    return torch.stack([*right, look[..., 0].sigmoid().mean(1),
                        (motion.argmax(1) == attrs[:, 3]).float(), steady[:, 0].sigmoid()], 1)
