"""One network, two teachers: a linear flow and a variance-preserving process with the same paths

A flow mixes latents x and noise e as z = (1 - t) x + t e. Divided by s = sqrt((1-t)^2 + t^2) it has
unit variance: z/s = cos(phi) x + sin(phi) e with tan(phi) = t / (1 - t), which is the
variance-preserving process at the angle phi. The network predicts v = cos(phi) e - sin(phi) x.
"""
from itertools import pairwise

import torch
from torch import Tensor

from nets import VideoNet


def scale_of(t: Tensor) -> Tensor:
    "Standard deviation s of the flow's latents at time t"
    return (t**2 + (1 - t)**2).sqrt()


def angle_of(t: Tensor) -> Tensor:
    "The angle phi of the variance-preserving process that matches the flow's time t"
    return torch.atan2(t, 1 - t)


def per_clip(a: Tensor) -> Tensor:
    "A number for each clip, ready to multiply latents"
    return a.view(-1, 1, 1, 1, 1)


def mixed(x: Tensor, e: Tensor, phi: Tensor) -> Tensor:
    "Noisy latents of unit variance"
    return per_clip(phi.cos()) * x + per_clip(phi.sin()) * e


def target(x: Tensor, e: Tensor, phi: Tensor) -> Tensor:
    "What the network shall predict"
    return per_clip(phi.cos()) * e - per_clip(phi.sin()) * x


def flow_velocity(net: VideoNet, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    "The flow's velocity e - x at time t, from the network's v: z (2t - 1) / s^2 + v / s"
    s = per_clip(scale_of(t))
    return z * per_clip(2 * t - 1) / s**2 + net(z / s, angle_of(t), context) / s


def guided(net: VideoNet, z: Tensor, t: Tensor, context: Tensor, nothing: Tensor,
           w: float) -> Tensor:
    "Velocity with classifier-free guidance: u + w (v - u)"
    if w == 1:
        return flow_velocity(net, z, t, context)
    both = torch.cat([context, nothing.expand_as(context)])
    v, u = flow_velocity(net, torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    return u + w * (v - u)


def draw_times(n: int, gen: torch.Generator, shift: float = 1.2, spread: float = 1.1,
               even: float = .15) -> Tensor:
    "Times in (0,1), one from each n-th of the draw: logit-normal, high noise favoured, some even"
    u = (torch.randperm(n, generator=gen) + torch.rand(n, generator=gen)) / n
    bell = (shift + spread * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).sigmoid()
    return torch.where(torch.rand(n, generator=gen) < even, torch.rand(n, generator=gen), bell)


@torch.no_grad()
def sample(net: VideoNet, context: Tensor, nothing: Tensor, noise: Tensor, steps: int = 50,
           w: float = 2.5, shift: float = 2.) -> Tensor:
    "Latents from noise by Euler steps; `shift` spends more of them at high noise"
    grid = torch.linspace(1, 0, steps + 1)
    grid = shift * grid / (1 + (shift - 1) * grid)
    z = noise
    for now, then in pairwise(grid):
        v = guided(net, z, now.expand(len(z)), context, nothing, w)
        z = z + (then - now) * v
    return z
