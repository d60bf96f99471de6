"""Seconds of the published sampler beside four steps of a student, at full size with random weights, on a GPU.

    python bench/full_size.py             # 16x256x256 and 16x320x512, bf16, a table in markdown
    python bench/full_size.py --small     # the same code on tiny networks; runs on a CPU in seconds
    python bench/full_size.py --json rows.json --repeats 5

Timed is the denoising loop: 50 DDIM steps with guidance (two network evaluations each, in one batch of two), and four steps of
the consistency sampler (one evaluation each). The VAE and the text encoder are left out; they cost both the same. Weights are
random, which changes no time. `ms` is ModelScopeT2V's UNet, `vc2` that of VideoCrafter2, which has the same layers and is told a
frame rate by a bias; both carry the w-projection, as teacher and student share one copy of the weights.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet3DConditionModel

from t2v_turbo.consistency import consistency_fn, few_step_grid, few_step_sample, w_embedding
from t2v_turbo.core import make_gen
from t2v_turbo.schedule import Schedule
from t2v_turbo.solver import DDIM, ddim_sample
from t2v_turbo.teachers.videocrafter2 import vc2_scheduler

FULL = dict(time_cond_proj_dim=256)                     # the class defaults are the published sizes
SMALL = dict(block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16, cross_attention_dim=64,
             down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
             up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), time_cond_proj_dim=256)


def network(config, device, dtype):
    "A UNet with random weights, made where it will run"
    torch.manual_seed(0)
    with torch.device(device): net = UNet3DConditionModel(**config)
    return net.to(dtype).eval().requires_grad_(False)


def wait(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def seconds(run, device, repeats):
    "Median of `repeats` runs after one that warms up, and the peak of GPU memory in GiB (weights included)"
    run(); wait(device)
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(); wait(device)
        took.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return statistics.median(took), peak


@torch.no_grad()
def rows_of(name, net, shape, device, args):
    "Two rows: the teacher's sampler, then the student's"
    schedule, gen = Schedule.from_diffusers(vc2_scheduler()).to(device), make_gen(0)
    z = torch.randn(1, *shape, generator=gen).to(device)
    ctx, null = torch.randn(2, 1, 77, net.config.cross_attention_dim, generator=gen).to(device, net.dtype)
    emb, calls = w_embedding(torch.tensor([7.5], device=device)).to(net.dtype), 0

    def denoise(zt, t, ctx, emb=None):
        nonlocal calls
        calls += len(zt)
        out = net(zt.to(net.dtype), t, encoder_hidden_states=ctx, timestep_cond=emb, return_dict=False)[0]
        return schedule.x0_eps(zt, out, t, "epsilon")

    def teacher():
        for _ in ddim_sample(DDIM(schedule, args.teacher_steps), denoise, z, 7.5, ctx, null): pass

    def student():
        f = lambda zt, t: consistency_fn(zt, denoise(zt, t, ctx, emb)[0], t)
        noise = lambda i: torch.randn(z.shape, device=device)
        for _ in few_step_sample(f, z, few_step_grid(args.student_steps), schedule, noise): pass

    rows = []
    for who, run, steps in (("teacher, guided", teacher, args.teacher_steps), ("student", student, args.student_steps)):
        calls = 0
        took, peak = seconds(run, device, args.repeats)
        rows.append(dict(network=name, clip=f"{shape[1]}x{shape[2] * 8}x{shape[3] * 8}", sampler=who, steps=steps,
                         evaluations=calls // (args.repeats + 1), seconds=took, peak_gib=peak))
    return rows


def table(rows):
    "Markdown; the last column is the teacher's time over this row's"
    head = ["network", "clip", "sampler", "steps", "evaluations", "seconds", "peak GiB", "speed-up"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for i, r in enumerate(rows):
        peak = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        lines.append(f"| {r['network']} | {r['clip']} | {r['sampler']} | {r['steps']} | {r['evaluations']} | "
                     f"{r['seconds']:.3g} | {peak} | {rows[i - i % 2]['seconds'] / r['seconds']:.1f} |")
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--small", action="store_true", help="tiny networks and clips, in float32 on a CPU")
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each sampler, after one that warms up")
    p.add_argument("--teacher_steps", type=int, default=50)
    p.add_argument("--student_steps", type=int, default=4)
    p.add_argument("--json", default="", help="also write the rows to this file")
    args = p.parse_args(argv)
    if not args.small and not torch.cuda.is_available():
        print("no GPU here: the full-size networks need one (2.8 GB of weights in bfloat16); give --small to try the script on a CPU",
              file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [(4, 2, 4, 4), (4, 2, 5, 8)] if args.small else [(4, 16, 32, 32), (4, 16, 40, 64)]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, one clip at a time, "
          f"median of {args.repeats}\n")
    rows = []
    for name in ("ms", "vc2"):
        net = network(SMALL if args.small else FULL, device, dtype)
        if name == "vc2": net.time_embedding.linear_2.bias.add_(.1)    # where the frame rate is
        for shape in sizes: rows += rows_of(name, net, shape, device, args)
        del net
    print(table(rows))
    if args.json: Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__": sys.exit(main())
