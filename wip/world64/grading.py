"""Clips as raters meet them: flaws, the autoencoder's trace, noise and ghosts, with grades"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import world
from nets import PatchVAE
from world import COUNTS, MOTIONS

NONE = len(MOTIONS)                       # class of a clip that does not move
CLASSES = (*COUNTS[:3], COUNTS[3] + 1)    # nouns, colours, scenes, motions and none


@dataclass
class Graded:
    "Clips with what a rater shall say"
    video: Tensor   # `(b 3 t 64 64)` in [0,1]
    labels: Tensor  # classes of noun, colour, scene, motion `(b 4)`
    hidden: Tensor  # how far noun and motion cannot be seen, 0..1 `(b,)`
    look: Tensor    # grade of single frames, 1 is clean `(b,)`
    steady: Tensor  # grade of the clip in time, 1 is steady `(b,)`

    def rows(self, at: Tensor) -> "Graded":
        "Some of the clips"
        return Graded(*(part[at] for part in vars(self).values()))


def joined(parts: list[Graded]) -> Graded:
    "All clips in one"
    return Graded(*(torch.cat(rows) for rows in zip(*(vars(p).values() for p in parts))))


def _column(a):
    return a.view(-1, 1, 1, 1, 1)


def look_grade(flaws: Tensor, noise: Tensor, ghost: Tensor) -> Tensor:
    "What is left of 1 after blur, watermark, noise (in deviations of a latent) and ghosts"
    clean = (1 - flaws[:, 0]) * (1 - flaws[:, 1])
    return (clean * (1 - noise / .75) * (1 - 1.8 * ghost)).clamp(0, 1)


def steady_grade(flaws: Tensor, noise: Tensor, ghost: Tensor) -> Tensor:
    "What is left of 1 after flicker, noise and ghosts"
    return ((1 - flaws[:, 2]) * (1 - noise / .75) * (1 - 1.4 * ghost)).clamp(0, 1)


def disordered(clips: Tensor, labels: Tensor, gen: torch.Generator, share: float = .12):
    "Freeze or shuffle a few clips in time; they move no more in any way that has a name"
    b, t = len(clips), clips.shape[2]
    order = torch.arange(t).repeat(b, 1)
    pick = torch.rand(b, generator=gen)
    for i in range(b):
        if pick[i] < share / 2:
            order[i] = torch.randint(t, (1,), generator=gen)
        elif pick[i] < share:
            order[i] = torch.randperm(t, generator=gen)
    labels = labels.clone()
    labels[pick < share, 3] = NONE
    return clips[torch.arange(b)[:, None], :, order].transpose(1, 2), labels, pick >= share


@torch.no_grad()
def graded(vae: PatchVAE, seed: int, step: int, size: int, split: str) -> Graded:
    "One batch: flaws, then the autoencoder (nine in ten) with noise or a ghost of another clip"
    gen = world.step_gen(seed, step)
    u = lambda: torch.rand(size, generator=gen)
    clean = world.batch(seed + 1, step, size, split, clean=True)
    x, flaws = world.web(clean.video, gen, (.25, .25, .25))
    noise, ghost = (u() < .2) * (.1 + .6 * u()), (u() < .25) * (.08 + .42 * u())
    raw, late = u() < .1, u() < .5
    noise, ghost = noise * ~raw, ghost * ~raw
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(x).float()
    other = z[torch.randperm(size, generator=gen)]
    other = torch.where(_column(late), other[:, :, :1].expand_as(other), other)
    z = torch.lerp(z, other, _column(ghost).expand_as(z))
    z = z + _column(noise) * torch.randn(z.shape, generator=gen)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.where(_column(raw), x, vae.decode(z).float())
    y, labels, ordered = disordered(y, clean.attrs, gen)
    hidden = (noise / .9 + .6 * ghost).clamp(0, .8)
    return Graded(y, labels, hidden, look_grade(flaws, noise, ghost),
                  steady_grade(flaws, noise, ghost) * (.5 + .5 * ordered))


def word_loss(heads: tuple, g: Graded, kinds: tuple) -> Tensor:
    """Cross-entropy of each kind of word, contrasted with the other words of its kind alone

    Labels of noun and motion are softened where a flaw hides them; those of colour and scene never.
    """
    total = 0.
    for k in kinds:
        n = heads[k].shape[1]
        soft = g.hidden if k in (0, 3) else torch.zeros_like(g.hidden)
        want = F.one_hot(g.labels[:, k], n) * (1 - soft[:, None]) + soft[:, None] / n
        total = total + F.cross_entropy(heads[k], want)
    return total


def grade_loss(logit: Tensor, grade: Tensor) -> Tensor:
    "Cross-entropy of a graded label"
    return F.binary_cross_entropy_with_logits(logit, grade)
