"""Train the autoencoder: `python train_vae.py --folder /work/data64/vae --steps 8000 --hours .4`"""
import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import world
from loop import train
from nets import CHANNELS, PatchVAE

CLIPS, FRAMES = 4, 4  # of each of clean and flawed clips in a step, and frames of a clip


def frames_of_step(seed: int, step: int) -> tuple[Tensor, Tensor]:
    "Half clean, half flawed frames `(32 3 64 64)` in [-1,1], and the cover of their sprites"
    gen = world.step_gen(seed + 1, step)
    parts = [world.batch(seed, 2 * step + clean, CLIPS, clean=clean) for clean in (True, False)]
    video, alpha = (torch.cat([getattr(b, k) for b in parts]) for k in ("video", "alpha"))
    at = torch.stack([torch.randperm(world.FRAMES, generator=gen)[:FRAMES] for _ in video])
    pick = lambda x: x[torch.arange(len(x))[:, None], at].flatten(0, 1)
    return pick(video.transpose(1, 2)) * 2 - 1, pick(alpha)


def loss(vae: PatchVAE, x: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
    "Errors of pixels and edges, sprites counted three times"
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.raw_encode(x)
        y = vae.raw_decode(z + noise * z.detach().float().std((0, 2, 3), keepdim=True))
    error, weight = y.float() - x, (1 + 2 * alpha)[:, None]
    weight = weight / weight.mean()
    edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
    return (weight * (error.abs() + 2 * error**2)).mean() + .5 * edges


@torch.no_grad()
def psnr(vae: PatchVAE, clips: Tensor) -> float:
    "Mean over clips of the peak signal-to-noise ratio"
    error = (vae.decode(vae.encode(clips)) - clips).pow(2).mean((1, 2, 3, 4))
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def set_statistics(vae: PatchVAE, seed: int, power: float = .5) -> None:
    """Normalise the latents of training clips, channels that show more a little louder

    The standard deviation of channel k becomes g_k^power, where g_k is the size of the change that
    one deviation of it makes in the picture, relative to the others (root mean square 1).
    """
    clips = torch.cat([world.batch(seed, i, 64).video for i in range(8)])
    vae.mean.zero_(), vae.std.fill_(1)
    z = vae.encode(clips)
    vae.mean.copy_(z.mean((0, 2, 3, 4)))
    std = z.std((0, 2, 3, 4))
    gain = (std * vae.synthesise.weight.norm(dim=0))**power
    vae.std.copy_(std / (gain / gain.pow(2).mean().sqrt()))


def main() -> None:
    "Train, or go on; write `vae.pt` when all steps are done"
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--steps", type=int, default=8000)
    p.add_argument("--hours", type=float, default=1.)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=10)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    vae = PatchVAE()
    vae.start_from_pca(torch.cat([frames_of_step(a.seed + 5, i)[0] for i in range(64)]))
    vae.to(memory_format=torch.channels_last)

    def loss_of(step):
        x, alpha = frames_of_step(a.seed, step)
        strength = .05 * min(1., max(0., 2 * step / a.steps - .5))
        noise = torch.randn(len(x), CHANNELS, 8, 8, generator=world.step_gen(a.seed + 2, step))
        return loss(vae, x.contiguous(memory_format=torch.channels_last), alpha, strength * noise)

    cosine = lambda step: min(1., (step + 1) / 200) * (.5 + .5 * math.cos(math.pi * step / a.steps))
    opt = torch.optim.AdamW(vae.parameters(), a.lr, (.9, .99), weight_decay=.01, fused=True)
    ema = train(vae, loss_of, cosine, a.folder, a.steps, a.hours, opt, decay=.998, per_step=32)
    vae.load_state_dict(ema, strict=False)
    set_statistics(vae, a.seed)
    torch.save(vae.state_dict(), a.folder / "vae.pt")
    print("psnr", psnr(vae, world.batch(99, 0, 128, "all", clean=True).video))


if __name__ == "__main__":
    main()
