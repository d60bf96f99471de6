"""Predicted memory of a training step beside measured memory: each configuration in a process of its own, for real.

    python bench/plan.py                  # small networks; on the CPU growth of resident memory, on CUDA the allocator's peak
    python bench/plan.py --only 0 2       # some of the configurations
    python bench/plan.py --full           # ModelScopeT2V and VideoCrafter2 at full size with random weights, on a GPU
    python bench/plan.py --json rows.json

Measured are two steps of `Distillation` with AdamW, weights included, in a process that has made and thrown away the same model before: then
libraries are loaded and kernels compiled, and what grows is ours. On the CPU the C library is told to give back freed memory at once, as
otherwise its own pools would be measured. (Wan has two clips a step: for a single small clip PyTorch's CPU convolution unfolds its input, which takes
scratch memory that no GPU would need.)
"""
import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, UNet3DConditionModel, WanTransformer3DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    UMT5Config,
    UMT5EncoderModel,
)

from t2v_turbo.core import make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.fit import GB
from t2v_turbo.memory import save_memory
from t2v_turbo.optimizer import make_optimizer
from t2v_turbo.plan import TEACHERS, NoWords, cast, plan_of, reward_on_meta, teacher_on_meta
from t2v_turbo.rewards.names import reward_named
from t2v_turbo.rewards.viclip import VICLIP_L, ViCLIP
from t2v_turbo.solver import TeacherAnswer
from t2v_turbo.student import Student
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.videocrafter2 import vc2_scheduler
from t2v_turbo.teachers.wan import WanTeacher, flow_scheduler, guided_wan

CONFIGS = [
    dict(kind="unet", width=32, frames=8, size=64, denoiser=False, decode=0),
    dict(kind="unet", width=64, frames=8, size=128, denoiser=False, decode=0),
    dict(kind="unet", width=64, frames=16, size=128, denoiser=True, decode=1),
    dict(kind="unet", width=128, frames=8, size=128, denoiser=False, decode=1),
    dict(kind="unet", width=128, frames=16, size=64, denoiser=True, decode=0, batch=2),
    dict(kind="unet", width=64, frames=8, size=128, denoiser=False, decode=0, dtype="bfloat16"),
    dict(kind="wan", width=96, frames=29, size=96, denoiser=False, decode=0, batch=2),
    dict(kind="wan", width=96, frames=29, size=96, denoiser=True, decode=1, batch=2),
    dict(kind="unet", width=64, frames=16, size=128, denoiser=False, decode=0, cached="latents"),
    dict(kind="unet", width=64, frames=16, size=128, denoiser=True, decode=1, cached="pairs"),
]
FULL = [dict(kind="full", teacher="modelscope", rewards=("hpsv2.1", "viclip-l14"), denoiser=True, decode=1, dtype="bfloat16"),
        dict(kind="full", teacher="videocrafter2", rewards=("hpsv2.1", "internvideo2"), denoiser=True, decode=1, dtype="bfloat16")]


def unet_parts(width, size, **_):
    "A `UNet3DConditionModel` of two levels, a VAE that shrinks eight times, a text encoder"
    unet = UNet3DConditionModel(sample_size=size//8, block_out_channels=(width, 2*width), attention_head_dim=16, cross_attention_dim=64,
                                norm_num_groups=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), time_cond_proj_dim=256)
    vae = AutoencoderKL(block_out_channels=(width//2, width, width, width), norm_num_groups=8, latent_channels=4, layers_per_block=1,
                        down_block_types=["DownEncoderBlock2D"]*4, up_block_types=["UpDecoderBlock2D"]*4)
    return unet, vae, CLIPTextModel(CLIPTextConfig(vocab_size=514, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                                   num_attention_heads=2, bos_token_id=1, eos_token_id=2))


def wan_parts(width, **_):
    "Wan's classes in small"
    net = WanTransformer3DModel(num_attention_heads=width//12, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=4*width, num_layers=4,
                                rope_max_seq_len=64)
    text = UMT5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return guided_wan(net), AutoencoderKLWan(base_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1), UMT5EncoderModel(text)


def small_viclip(device, dtype):
    each = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, hidden_act="quick_gelu")
    with torch.device(device):
        reward = ViCLIP(VICLIP_L, CLIPVisionConfig(**each, image_size=112, patch_size=14, attn_implementation="sdpa"),
                        CLIPTextConfig(**each, vocab_size=520, max_position_embeddings=32, pad_token_id=0, projection_dim=24,
                                       bos_token_id=1, eos_token_id=2), NoWords())
    return reward.frozen(dtype)


def made(net, device):
    "A network of `meta` with memory and random weights"
    if device == "meta": return net
    buffers = {n: tuple(b.shape) for n, b in net.named_buffers()}
    net.to_empty(device=device)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.02)
    for n in buffers: net.get_buffer(n).zero_()
    return net


def build(c, device):
    "The whole step of a configuration on one device"
    dtype, gen = getattr(torch, c.get("dtype", "float32")), c["kind"]
    torch.manual_seed(0)
    if gen == "full":
        _, frames, size = TEACHERS[c["teacher"]]
        teacher = made(teacher_on_meta(c["teacher"], frames, size, dtype), device)
        image, video = (made(reward_on_meta(n, dtype), device) for n in c["rewards"])
    else:
        with torch.device(device): parts = unet_parts(**c) if gen == "unet" else wan_parts(**c)
        parts, size = [cast(p, dtype) for p in parts], (c["size"],)*2
        teacher = (Teacher("unet", *parts, NoWords(), vc2_scheduler(), c["frames"], size=size) if gen == "unet" else
                   WanTeacher("wan", *parts, NoWords(), flow_scheduler(), c["frames"], size=size, tokens=24)).to(device)
        image, video = reward_named("tiny-image").to(device), small_viclip(device, dtype)
    teacher.fingerprints = dict
    student = Student(teacher, 64 if gen == "full" else 16)
    save_memory(teacher, c["denoiser"], c["decode"])
    return Distillation(student, Objective(image_frames=2, video_frames=8), image, video)


def train(c, device, steps):
    "Some steps as the trainer takes them"
    model = build(c, device)
    teacher, params, b = model.student.teacher, list(model.student.trainable().values()), c.get("batch", 1)
    opt, prompts = make_optimizer("adamw", params, 1e-4), [f"prompt {i}" for i in range(b)]
    texts, cached = (teacher.encode_text(prompts), teacher.encode_text([""]*b)), c.get("cached", "")
    if cached: teacher.text_encoder = torch.nn.Module()    # nobody asks it any more
    for i in range(steps):
        d = draw(model.cfg, (b, *teacher.latent_shape), make_gen(i)).to(device)
        z0 = torch.rand_like(d.noise) if cached else teacher.encode(torch.rand(b, *teacher.video_shape, device=device))
        pair = TeacherAnswer(z0, d.index, torch.rand_like(z0), torch.rand_like(z0)) if cached == "pairs" else None
        ctx, null = texts[0] if cached else teacher.encode_text(prompts), texts[1]
        out = model(z0, ctx, null, prompts, d, pair=pair)
        out.loss.mean().backward()
        opt.step(); opt.zero_grad()
        del out, z0, pair


def resident(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])*1024


def measured(c):
    "Bytes of two steps at their highest point; run in a fresh process"
    cuda = torch.cuda.is_available()
    train(c, "cuda" if cuda else "cpu", 1)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(c, "cuda", 2)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")          # forget the highest point so far
    train(c, "cpu", 2)
    return resident("VmHWM") - before


def compare(c):
    "Predicted and measured bytes of one configuration"
    pools = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    run = subprocess.run([sys.executable, __file__, "--measure", json.dumps(c)], env=os.environ | pools, capture_output=True, text=True)
    if run.returncode: raise RuntimeError(run.stderr[-2000:])
    return plan_of(build(c, "meta"), c.get("batch", 1), cached=c.get("cached", "")).total, int(run.stdout.split()[-1])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", type=int, nargs="*", help="numbers of the configurations")
    p.add_argument("--full", action="store_true", help="the published sizes; needs a GPU")
    p.add_argument("--json", help="write the rows here")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.measure: print(measured(json.loads(a.measure))); return 0
    if a.full and not torch.cuda.is_available():
        print("--full needs a GPU: leave it out to measure small networks on the CPU", file=sys.stderr)
        return 2
    configs, rows = FULL if a.full else CONFIGS, []
    print("| configuration | predicted GB | measured GB | predicted / measured |\n|---|---|---|---|")
    for i in a.only if a.only is not None else range(len(configs)):
        mine, real = compare(configs[i])
        rows.append(dict(config=configs[i], predicted=mine, measured=real))
        name = " ".join(f"{k}={v}" for k, v in configs[i].items())
        print(f"| {name} | {mine/GB:.3f} | {real/GB:.3f} | {mine/real:.3f} |", flush=True)
    if a.json: Path(a.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__": sys.exit(main())
