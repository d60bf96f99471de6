"""One training step of the published recipe beside ours: the same weights, clips, captions and random numbers.

    python bench/train_step.py                        # ModelScope's layout at a tenth of its width, and the tiny teacher
    python bench/train_step.py --parts agree memory   # only some of: agree, time, memory, share, growth, size
    python bench/train_step.py --full                 # ModelScopeT2V 256x256x16 with HPSv2.1 and ViCLIP, VideoCrafter2 320x512x16
                                                      # with HPSv2.1 and InternVideo2: published sizes, random weights, on a GPU
    python bench/train_step.py --full --width 32      # the same code on small networks; runs on a CPU
    accelerate launch --num_processes 2 bench/train_step.py --parts agree time       # both in one process group
    python bench/train_step.py --json nbs/experiments/train_step.json

A, `Published`, is the published recipe written from the paper's equations: a float32 teacher, a float32 student with LoRA, four calls
of the UNet, a decode for each reward, the VAE's encoder and the text encoder in every step, nothing kept or shared and nothing run
again in backward. On a GPU it runs under bfloat16 autocast, with VAE, text encoder and rewards in bfloat16, as published.
B, `Ours`, is the library's own `Trainer`, without caches, with texts and latents cached, and with the teacher's answers cached;
each as it is, with memory saved, and with a frozen base in bfloat16 as well; the last one also with frames decoded one by one alone.

agree    loss and gradient of A and of each B at the same step. Below full size A is run in float64 too: how far float32 is from it
         is A's own rounding, and a B that differs from A by more than three times that ends the script (see `allowed`)
time     seconds a step in alternating pairs A B, B A, ..: the median ratio of the pairs and its spread. On a CPU these are seconds
         of the processor, all threads together
memory   the highest point of two steps, weights included, each in a process of its own (see bench/plan.py)
share    the parts of a step
size     bytes and operations of both published teachers at full size, counted on `meta`; needs no GPU
growth   seconds, and bytes as counted by `Meter`, over frames, pixels and batch: the exponent is a least-squares line in log-log
"""
import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch as replaced

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet3DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from scipy.stats import linregress
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

from t2v_turbo import standins
from t2v_turbo import train as training
from t2v_turbo.consistency import w_embedding
from t2v_turbo.core import make_gen, step_gen
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.recipes import dice
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.fit import GB
from t2v_turbo.memory import save_memory, savings_of
from t2v_turbo.meter import Meter
from t2v_turbo.optimizer import make_optimizer
from t2v_turbo.plan import _FULL, NoWords, _attention, cast, plan_of, save_reward, weights_of
from t2v_turbo.rewards import internvideo2 as iv2
from t2v_turbo.rewards.clip import HPS, CLIPReward
from t2v_turbo.rewards.loading import letterbox
from t2v_turbo.rewards.names import reward_named
from t2v_turbo.rewards.viclip import VICLIP_L, ViCLIP
from t2v_turbo.student import Student
from t2v_turbo.teachers.base import Teacher, tokenize, zero_w_projection
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.videocrafter2 import vc2_scheduler
from t2v_turbo.text import clip_tokenizer
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import World

FULL = 320                                # width of the published networks
SEED = 0
ROUNDING = dict(loss=1e-5, gradient=1e-3) # |difference| / |A|, of the loss and of the whole gradient, everything in float32
FLOOR = dict(loss=1e-6, gradient=1e-5)    # where A is known in float64: this, or three times A's own distance from it
BF16 = dict(loss=.2, gradient=1.5)        # where networks are in bfloat16. Ten draws of one clip of the tiny world: A itself, under autocast, is
                                          # off by up to .02 of its loss and by .02 to .60 of its gradient, ours by .01 and by .03 to .66; narrow random networks up to 1.1
PUBLISHED = {"modelscope": dict(size=(256, 256), rewards=("hpsv2.1", "viclip-l14"), beta=(2., 3.), rank=32),
             "videocrafter2": dict(size=(320, 512), rewards=("hpsv2.1", "internvideo2"), beta=(1., 2.), rank=64)}
CACHES = {"no cache": "", "texts, latents cached": "latents", "teacher cached": "pairs"}
SWITCHES = {"": dict(), "decode saved": dict(save="decode"), "memory saved": dict(save="all"),
            "memory saved, bf16": dict(save="all", dtype="bfloat16")}
VARIANTS = {", ".join(filter(None, (f"ours, {c}", s))): dict(cache=kind, **how)
            for c, kind in CACHES.items() for s, how in SWITCHES.items() if s != "decode saved" or kind == "pairs"}
A = "published"


# ---- what both train

def case_of(teacher, width=32, frames=16, size=None, batch=1):
    "The sizes of a step, as a dict of plain values"
    if teacher == "tiny":
        return dict(teacher="tiny", frames=8, size=(64, 64), batch=batch, rank=16, beta=(1., 1.), image=2, video=8)
    p = PUBLISHED[teacher]
    size = size or (p["size"] if width == FULL else tuple(v//4 for v in p["size"]))
    return dict(p, teacher=teacher, width=width, frames=frames, size=tuple(size), batch=batch, rank=max(4, p["rank"]*width//FULL),
                image=min(6, frames), video=8)


def depth(layers, width):
    "Layers of a transformer; next to none where only the code is tried"
    return layers if width >= 16 else 2


def unet_parts(width, size):
    """UNet, VAE and text encoder of ModelScopeT2V, every layer narrower by `width`/320. Pixels are kept away from 0 and 1, where they
    are clamped: one that is on the other side by rounding alone was seen to be 4e-4 of the gradient"""
    heads, base, small = max(1, round(16*width/FULL)), max(8, width*2//5//8*8), width < FULL
    unet = UNet3DConditionModel(sample_size=size[0]//8, block_out_channels=(width, 2*width, 4*width, 4*width), attention_head_dim=
                                max(8, 64*width//FULL), cross_attention_dim=64*heads, norm_num_groups=8 if small else 32,
                                time_cond_proj_dim=256)
    vae = AutoencoderKL(block_out_channels=(base, 2*base, 4*base, 4*base), layers_per_block=2, latent_channels=4, norm_num_groups=8
                        if small else 32, down_block_types=["DownEncoderBlock2D"]*4, up_block_types=["UpDecoderBlock2D"]*4)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=514 if small else 49408, hidden_size=64*heads, intermediate_size=256*heads,
                                        num_hidden_layers=depth(23, width), num_attention_heads=heads, hidden_act="gelu",
                                        bos_token_id=512, eos_token_id=513))
    with torch.no_grad(): vae.decoder.conv_out.weight.mul_(.1)
    return zero_w_projection(unet), vae, text


def reward_of(name, width):
    "A reward; at less than full width one of the same classes and depth that is as narrow, and sees 56 pixels (InternVideo2: 2 layers, 32)"
    if width == FULL: return _FULL[name]()
    if name == "internvideo2": return iv2.internvideo2_model(standins.tiny_internvideo2(), **standins.TINY)
    wide = 64*max(1, round((20 if name == "hpsv2.1" else 16)*width/FULL))
    each = dict(hidden_size=wide, intermediate_size=4*wide, num_attention_heads=wide//64)
    words = dict(each, vocab_size=520, num_hidden_layers=depth(24 if name == "hpsv2.1" else 12, width), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if name == "viclip-l14":
        return ViCLIP(VICLIP_L, CLIPVisionConfig(**each, num_hidden_layers=depth(24, width), image_size=56, patch_size=14, hidden_act="quick_gelu",
                                                 attn_implementation="sdpa"),
                      CLIPTextConfig(**words, max_position_embeddings=32, projection_dim=wide, hidden_act="quick_gelu"))
    return CLIPReward(HPS, CLIPModel(CLIPConfig(projection_dim=wide, vision_config=dict(
        each, num_hidden_layers=depth(32, width), image_size=56, patch_size=14, hidden_act="gelu"), text_config=words)), None, letterbox)


def build(c, device, dtype=torch.float32):
    "Teacher, image reward and video reward, with the same random weights every time"
    torch.manual_seed(SEED)
    if c["teacher"] == "tiny":
        teacher = load_teacher("tiny", dtype=dtype)
        image, video = (reward_named(f"tiny-{k}") for k in ("image", "video"))
        if device != "meta": image, video = (r.frozen(dtype) for r in (image, video))
        return teacher.to(device), image.to(device), video.to(device)
    with torch.device(device):
        parts = [cast(p, dtype) for p in unet_parts(c["width"], c["size"])]
        image, video = (reward_of(n, c["width"]).to(device).frozen(dtype) for n in c["rewards"])
    for r in (image, video): r.tokenizer = NoWords()
    teacher = Teacher(c["teacher"], *parts, clip_tokenizer([], 514), vc2_scheduler(), c["frames"], size=c["size"])
    if device == "meta": teacher.fingerprints = dict
    return teacher.to(device), image, video


class Clips:
    "Random clips with captions of the tiny world; any size"
    kind = "clips"
    def __init__(self, c): self.c = c
    def fingerprint(self): return json.dumps(self.c)
    def batch(self, step, size, rows=slice(None)):
        x = torch.rand(size, 3, self.c["frames"], *self.c["size"], generator=make_gen(1 + step))
        return x[rows], World(seed=SEED).batch(step, size, rows)[1]


def objective(c):
    "Raw rewards, weighted as in the published run on 8 GPUs; 6 frames for the image reward, 8 for the video reward"
    return Objective(k=20, w_min=5., w_max=15., beta_img=c["beta"][0], beta_vid=c["beta"][1], image_frames=c["image"],
                     video_frames=c["video"]).as_published()


def moved(params):
    "Adapters in which nothing is zero, the same for everybody"
    gen = make_gen(5)
    with torch.no_grad():
        for p in params:
            if p.device.type != "meta": p.copy_(.02*torch.randn(p.shape, generator=gen))
    return params


# ---- A: the published recipe

class Published(nn.Module):
    "Eq. 5 to 11 one after the other. Differences to the published run: no dropout, and the w-projection is trained whole as ours is"
    def __init__(self, c, teacher, image, video, autocast=False, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.cfg, self.image, self.video, self.autocast = objective(c), image, video, autocast
        self.vae, self.text, self.tokenizer = teacher.vae, teacher.text_encoder, teacher.tokenizer
        self.v, self.part = teacher.prediction_type == "v_prediction", lambda name: nullcontext()
        self.mean, self.std = (v[..., None].to(dtype) for v in (teacher.latent_mean, teacher.latent_std))
        self.abar = teacher.schedule.abar.to(teacher.device, dtype)
        self.teacher, self.student = teacher.denoiser, copy.deepcopy(teacher.denoiser)
        layers = [n for n, m in self.student.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)) and "cond_proj" not in n]
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(LoraConfig(r=c["rank"], lora_alpha=c["rank"], target_modules=layers), self.student)
        for n, p in self.student.named_parameters():
            if "cond_proj" in n: p.requires_grad_(True)
        self.null = self.words([""])

    def params(self): return [p for p in self.student.parameters() if p.requires_grad]

    def words(self, prompts):
        with torch.no_grad(): return self.text(tokenize(self.tokenizer, prompts).to(self.abar.device)).last_hidden_state

    @torch.no_grad()
    def encode(self, clips):
        "Frames to latents, eight at a time"
        x = clips.transpose(1, 2).flatten(0, 1)*2 - 1
        z = torch.cat([self.vae.encode(p.to(self.vae.dtype)).latent_dist.mean.to(self.dtype) for p in x.split(8)])
        return (z.unflatten(0, (len(clips), -1)).transpose(1, 2) - self.mean)/self.std

    def decode(self, z):
        "Latents to frames, all at once"
        y = (z*self.std + self.mean).transpose(1, 2).flatten(0, 1)
        x = self.vae.decode(y.to(self.vae.dtype)).sample.to(self.dtype)
        return (x/2 + .5).clamp(0, 1).unflatten(0, (len(z), -1)).transpose(1, 2)

    def at(self, t):
        "alpha and sigma, each (b 1 1 1 1)"
        a = self.abar[t].view(-1, 1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def ask(self, net, zt, t, ctx, emb=None):
        "Data and noise that a network sees in `zt`"
        out = net(zt, t, encoder_hidden_states=ctx.to(self.dtype), timestep_cond=emb, return_dict=False)[0].to(self.dtype)
        alpha, sigma = self.at(t)
        if self.v: return alpha*zt - sigma*out, alpha*out + sigma*zt
        return (zt - sigma*out)/alpha, out

    def f(self, zt, t, ctx, w):
        "The consistency function, eq. 5 (a last bit of w's frequencies is 1e-3 of its sines: the embedding is the library's)"
        x0, _ = self.ask(self.student, zt, t, ctx, w_embedding(w).to(self.dtype))
        lt = 10*t.to(self.dtype).view(-1, 1, 1, 1, 1)
        return .25/(lt**2 + .25)*zt + lt/(lt**2 + .25).sqrt()*x0

    def forward(self, clips, prompts, d):
        "Loss and terms of some clips, per clip"
        with torch.autocast(clips.device.type, torch.bfloat16) if self.autocast else nullcontext(): return self.terms(clips, prompts, d)

    def terms(self, clips, prompts, d):
        cfg, b = self.cfg, len(clips)
        with self.part("text"): ctx = self.words(prompts)
        with self.part("encode"): z0 = self.encode(clips)
        t = 20*d.index + 19
        s, w = (t - 20).clamp_min(0), d.w.view(-1, 1, 1, 1, 1)
        alpha, sigma = self.at(t)
        zt = alpha*z0 + sigma*d.noise.to(self.dtype)
        with self.part("student"): x0 = self.f(zt, t, ctx, d.w)
        with self.part("decode"): frames = self.decode(x0[:, :, d.image_frames])
        with self.part("image reward"):
            each = frames.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            r_img = self.image(each, [p for p in prompts for _ in d.image_frames]).view(b, -1).mean(1)                    # eq. 8
        with self.part("decode again"): frames = self.decode(x0[:, :, d.video_frames])
        with self.part("video reward"): r_vid = self.video(frames, prompts)                                               # eq. 9
        with torch.no_grad():
            with self.part("teacher"):
                x_c, eps_c = self.ask(self.teacher, zt, t, ctx)
                x_u, eps_u = self.ask(self.teacher, zt, t, self.null.expand(b, -1, -1))
            alpha, sigma = self.at(s)
            z_prev = alpha*(x_c + w*(x_c - x_u)) + sigma*(eps_c + w*(eps_c - eps_u))                                      # eq. 7, 11
            with self.part("target"): target = self.f(z_prev, s, ctx, d.w)
        cd = (((x0 - target)**2 + 1e-6).sqrt() - 1e-3).flatten(1).mean(1)                                                 # eq. 6
        loss = cd - cfg.beta_img*r_img - cfg.beta_vid*r_vid                                                               # eq. 10
        return dict(loss=loss, cd=cd.detach(), r_img=r_img.detach(), r_vid=r_vid.detach())


def dealt(cfg, shape, gen=None):
    "The random numbers of the step; noise and grid points are those of the cache, so that every variant works on the same"
    noise, index = dice(SEED, 0, shape, 1000//cfg.k)
    return replace(draw(cfg, shape, step_gen(SEED, 0, "noise")), noise=noise, index=index)


class Theirs:
    "A with accelerate and AdamW around it; `read`, `backward` and `update` as the trainer has them"
    def __init__(self, c, device, autocast=False, dtype=torch.float32):
        teacher, image, video = build(c, device)
        if autocast:
            for part in (teacher.vae, teacher.text_encoder, image, video): part.to(torch.bfloat16)
        self.c, self.source, self.phase = c, Clips(c), lambda name: nullcontext()
        self.acc = Accelerator(cpu=device == "cpu")
        for part in (teacher, image, video) if dtype == torch.float64 else (): part.to(dtype)
        net = Published(c, teacher, image, video, autocast, dtype)
        self.net, self.params, self.shape = net, moved(net.params()), (c["batch"], *teacher.latent_shape)
        self.model, self.opt = self.acc.prepare(net, make_optimizer("adamw", self.params, 1e-5))
        n = c["batch"]//self.acc.num_processes
        self.rows, self.rewards = slice(self.acc.process_index*n, (self.acc.process_index + 1)*n), (image, video)

    def read(self): return self.source.batch(0, self.c["batch"], self.rows)

    def backward(self, read):
        clips, prompts = read
        dev = self.acc.device
        d = dealt(self.net.cfg, self.shape).resolve(self.c["frames"], self.net.cfg).rows(self.rows)
        out = self.model(clips.to(dev, self.net.dtype), prompts, d.to(dev))
        with self.phase("backward"): self.acc.backward(out["loss"].mean())
        return {k: float(self.acc.reduce(v.detach().mean(), "mean")) for k, v in out.items()}

    def update(self):
        with self.phase("optimiser"):
            self.acc.clip_grad_norm_(self.params, 1.)
            self.opt.step()
            self.opt.zero_grad()

    @contextmanager
    def phases(self, clock):
        "The parts of a step go to `clock`"
        self.phase = self.net.part = clock.phase
        try: yield
        finally: self.phase = self.net.part = lambda name: nullcontext()


# ---- B: ours

class Ours(Trainer):
    "The library's trainer on a teacher that has no folder"
    def __init__(self, c, device, variant, caches, out):
        save, kind = variant.get("save", ""), variant["cache"]
        teacher, image, video = build(c, device, getattr(torch, variant.get("dtype", "float32")))
        self.made, self.c, self.rewards = teacher, c, (image, video)
        if "rewards" in savings_of(save):
            for r in self.rewards: save_reward(r)
        super().__init__(Config(out=out, batch=c["batch"], rank=c["rank"], save_memory=save, objective=objective(c), ema=0., lr=1e-5,
                                data=f"{caches}/{kind}" if kind else "", texts=f"{caches}/text" if kind else "", seed=SEED, track=""),
                         image, video)
        self.opt = self.engine.opt
        moved(self.params)

    def _teacher(self): return self.made
    def _source(self, teacher): return super()._source(teacher) if self.cfg.data else Clips(self.c)
    def read(self): return self.source.batch(0, self.cfg.batch, self.rows)
    def backward(self, read):
        with replaced.object(training, "draw", dealt): return super().backward(read)
    def update(self):
        super().update()
        self.step = 0                                              # the same clips and the same random numbers every time

    @contextmanager
    def phases(self, clock):
        phase = lambda name: clock.phase("optimiser" if name == "update" else name)
        with replaced.object(self.model, "phase", phase): yield


def make_caches(c, device, folder):
    "The three caches, in float32"
    teacher, *_ = build(c, device)
    source, n = Clips(c), c["batch"]
    more = dict(samples=n, batch=n, dtype="float32", progress=False)
    texts = build_cache("text", teacher, source.batch(0, n)[1], f"{folder}/text", dtype="float32", progress=False)
    build_cache("latents", teacher, source, f"{folder}/latents", **more)
    build_cache("pairs", teacher, source, f"{folder}/pairs", k=20, seed=SEED, **more)
    return str(texts.parent)


def make(c, device, name, caches, out, autocast=False):
    "A or one of B"
    return Theirs(c, device, autocast) if name == A else Ours(c, device, VARIANTS[name], caches, out)


# ---- measuring

def now():
    "On a CPU the seconds that this process had it, so that what else runs there counts little"
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def step(it):
    "One step, with captions that no reward has seen; what was logged"
    for r in it.rewards: vars(r).get("_texts", {}).clear()
    row = it.backward(it.read())
    it.update()
    return row


def seconds(it):
    wait()
    start = now()
    step(it)
    wait()
    return now() - start


def gradient(it):
    "Terms and gradient at the first step, which is not taken"
    row = it.backward(it.read())
    flat = torch.cat([p.grad.detach().flatten().double().cpu() for p in it.params])
    it.opt.zero_grad()
    return {k: row[k] for k in ("loss", "cd", "r_img", "r_vid")}, flat


def apart(a, b):
    "|b - a| / |a| of loss and gradient"
    return dict(loss=abs(b[0]["loss"] - a[0]["loss"])/abs(a[0]["loss"]), gradient=float((b[1] - a[1]).norm()/a[1].norm()))


def allowed(exact, a):
    "How far B may be from A: three times as far as A is from float64"
    if exact is None: return ROUNDING
    return {k: max(FLOOR[k], 3*v) for k, v in apart(exact, a).items()}


def check(name, off, most):
    "Refuse a B that does not compute what A computes"
    for k, v in off.items():
        if not v <= most[k]: raise SystemExit(f"A and B disagree: the {k} of {name!r} differs by {v:.2g} of A's, more than {most[k]:.2g}")


class Clock:
    "Seconds of each part"
    def __init__(self): self.parts = {}
    @contextmanager
    def phase(self, name):
        wait()
        start = now()
        try: yield
        finally:
            wait()
            self.parts[name] = self.parts.get(name, 0) + now() - start


def shares(it, repeats):
    "Seconds of the parts of a step, the mean of some"
    clock = Clock()
    with it.phases(clock):
        for _ in range(repeats):
            with clock.phase("all"):
                for r in it.rewards: vars(r).get("_texts", {}).clear()
                with clock.phase("read"): got = it.read()
                it.backward(got)
                it.update()
    parts = {k: v/repeats for k, v in clock.parts.items()}
    parts["decode"] = parts["decode"] + parts.pop("decode again", 0)
    whole = parts.pop("all")
    return parts | {"rest": whole - sum(parts.values())}


def resident(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])*1024


def measured(c, device, name, caches, autocast):
    "Bytes of two steps at their highest point, weights included; run in a fresh process"
    def run(steps):
        with tempfile.TemporaryDirectory() as out:
            it = make(c, device, name, caches, out, autocast)
            for _ in range(steps): step(it)
    run(1)                                                         # libraries are loaded, kernels compiled
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(2)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")                  # forget the highest point so far
    run(2)
    return resident("VmHWM") - before


def memory(c, name, caches, autocast):
    "`measured` in a process of its own; `None` where the GPU is too small"
    pools = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    told = json.dumps(dict(c=c, name=name, caches=caches, autocast=autocast))
    run = subprocess.run([sys.executable, __file__, "--measure", told], env=os.environ | pools, capture_output=True, text=True,
                         stdin=subprocess.DEVNULL)
    if run.returncode and "OutOfMemoryError" in run.stderr: return None
    if run.returncode: raise RuntimeError(run.stderr[-2000:])
    return int(run.stdout.split()[-1])


def counted(it):
    "Bytes of one step as `Meter` counts them: weights, AdamW's state, and the highest point of the rest"
    tensors = [*it.model.parameters(), *it.model.buffers()]
    for p in it.params: p.grad = None
    got = it.read()
    with Meter(it.params[0].device.type, tensors) as m: it.backward(got)
    it.opt.zero_grad()
    return m.peak + sum(t.nbytes for t in tensors) + 8*sum(p.numel() for p in it.params), m.flops


def published_size(teacher):
    "Bytes and operations of A and of some B at the published size, on a device that has no memory; A all in float32"
    c, rows = case_of(teacher, FULL), []
    net = Published(c, *build(c, "meta"))
    d = dealt(net.cfg, (1, 4, c["frames"], *(v//8 for v in c["size"]))).resolve(c["frames"], net.cfg).to("meta")
    clips, mine = torch.rand(1, 3, c["frames"], *c["size"], device="meta"), net.params()
    with Meter("meta", [*net.parameters(), *net.buffers(), net.null]) as m, replaced.object(F, "scaled_dot_product_attention", _attention):
        net.part = m.phase
        out = net(clips, ["a prompt"], d)
        with m.phase("backward"): out["loss"].mean().backward()
    rows.append(dict(name=A, bytes=weights_of(net) + 8*sum(p.numel() for p in mine) + m.peak,
                     flops={k: v["flops"] for k, v in m.phases.items()}))
    for name, v in VARIANTS.items():
        saved = savings_of(v.get("save", ""))
        if v["cache"] == "latents" or "denoiser" in saved and "dtype" not in v: continue
        made, image, video = build(c, "meta", getattr(torch, v.get("dtype", "float32")))
        save_memory(made, "denoiser" in saved, int("decode" in saved))
        for rm in (image, video): save_reward(rm, "rewards" in saved)
        plan = plan_of(Distillation(Student(made, c["rank"]), objective(c), image, video), cached=v["cache"])
        rows.append(dict(name=name, bytes=plan.total, flops={k: p["flops"] for k, p in plan.phases.items()}))
    return dict(case=c, rows=rows)


def fit(x, y):
    "Exponent of y ~ x**n and its standard error, by least squares in log-log"
    line = linregress(torch.tensor(x).double().log(), torch.tensor(y).double().log())
    return dict(exponent=float(line.slope), error=float(line.stderr))


AXES = dict(frames=("frames", (8, 12, 16, 24)), pixels=("size", (.5, 1, 1.5, 2)), batch=("batch", (1, 2, 3)))
GROWN = A, "ours, teacher cached, memory saved"


def growth(base, device, repeats, autocast):
    "Seconds and bytes of `GROWN` over one size at a time, and how fast they grow"
    rows, fits, (h, w) = [], [], base["size"]
    for axis, (key, values) in AXES.items():
        for v in values:
            c = base | {key: (h, int(w*v)) if axis == "pixels" else v}
            with tempfile.TemporaryDirectory() as tmp:
                caches = make_caches(c, device, f"{tmp}/caches")
                for name in GROWN:
                    it = make(c, device, name, caches, f"{tmp}/out", autocast)
                    step(it)
                    many = [seconds(it) for _ in range(repeats)]
                    bytes_, flops = counted(it)
                    x = c["size"][0]*c["size"][1] if axis == "pixels" else v
                    rows.append(dict(axis=axis, x=x, name=name, seconds=statistics.median(many), bytes=bytes_, flops=flops))
                    del it
        for name in GROWN:
            mine = [r for r in rows if (r["axis"], r["name"]) == (axis, name)]
            for what in ("seconds", "bytes", "flops"):
                fits.append(dict(axis=axis, name=name, what=what, **fit([r["x"] for r in mine], [r[what] for r in mine])))
    return dict(points=rows, fits=fits)


# ---- the table

def compare(c, device, names, parts, pairs, autocast, say):
    "All rows of one case: A first, then each of B"
    rows, main = [], Accelerator(cpu=device == "cpu").is_main_process
    with tempfile.TemporaryDirectory() as tmp:
        caches = make_caches(c, device, f"{tmp}/caches")
        a = make(c, device, A, caches, f"{tmp}/out", autocast)
        numbers, exact, times = gradient(a), None, []
        rows.append(dict(name=A, terms=numbers[0]))
        if "agree" in parts and not autocast and c.get("width") != FULL:
            exact = gradient(Theirs(c, device, dtype=torch.float64))
            rows[0] |= dict(rounding=apart(exact, numbers))
        if parts & {"time", "share"}: seconds(a)
        for name in names:
            b = make(c, device, name, caches, f"{tmp}/out")
            row = dict(name=name)
            if "agree" in parts:
                mine = gradient(b)
                row["off"] = apart(numbers, mine)
                if exact is not None: row["rounding"] = apart(exact, mine)
                check(name, row["off"], BF16 if autocast or "dtype" in VARIANTS[name] else allowed(exact, numbers))
            if "time" in parts:
                seconds(b)
                both = [[seconds(it) for it in ((a, b), (b, a))[i % 2]][::(1, -1)[i % 2]] for i in range(pairs)]
                ratios = [y/x for x, y in both]
                times += [x for x, _ in both]
                row |= dict(seconds=statistics.median(y for _, y in both), ratios=ratios, ratio=statistics.median(ratios))
            if "share" in parts: row["share"] = shares(b, max(1, pairs//2))
            rows.append(row)
            say(f"    {name}: " + json.dumps({k: v for k, v in row.items() if k in ("off", "ratio")}))
            del b
        if times: rows[0] |= dict(seconds=statistics.median(times), ratio=1.)
        if "share" in parts: rows[0]["share"] = shares(a, max(1, pairs//2))
        del a
        gc.collect()
        if device == "cuda": torch.cuda.empty_cache()
        for row in rows if "memory" in parts and main else ():
            row["bytes"] = memory(c, row["name"], caches, autocast)
            say(f"    {row['name']}: {(row['bytes'] or 0)/GB:.3f} GB")
    return rows


def table(rows):
    "Markdown; times and memory as they are and over A's"
    head = ["step", "s", "time / A", "spread", "GB", "memory / A", "loss off A", "gradient off A", "off float64"]
    lines, base = ["| " + " | ".join(head) + " |", "|" + " --- |"*len(head)], rows[0].get("bytes")
    for r in rows:
        many, off, got = r.get("ratios", []), r.get("off", {}), r.get("bytes")
        cell = lambda v, how: "-" if v is None else format(v, how)
        lines.append(" | ".join([f"| {r['name']}", cell(r.get("seconds"), ".3g"), cell(r.get("ratio"), ".2f"),
                                 f"{min(many):.2f} to {max(many):.2f}" if many else "-", cell(got and got/GB, ".3f"),
                                 cell(got/base if got and base else None, ".2f"), cell(off.get("loss"), ".0e"),
                                 cell(off.get("gradient"), ".0e"), cell(r.get("rounding", {}).get("gradient"), ".0e") + " |"]))
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--teachers", nargs="*", default=None, help="of modelscope, videocrafter2, tiny; default: modelscope and tiny")
    p.add_argument("--full", action="store_true", help="modelscope and videocrafter2 at their published sizes; needs a GPU")
    p.add_argument("--width", type=int, default=None, help=f"of the UNet's first level, a multiple of 8; 32, and {FULL} with --full")
    p.add_argument("--frames", type=int, default=16, help="of a clip, 8 or more")
    p.add_argument("--size", type=int, nargs=2, help="height and width; by default the published ones, a quarter of them below full width")
    p.add_argument("--batch", type=int, default=1, help="clips a step, over all processes")
    p.add_argument("--parts", nargs="*", default=["agree", "time", "memory", "share", "growth", "size"])
    p.add_argument("--variants", nargs="*", default=list(VARIANTS), help="of B; all by default")
    p.add_argument("--pairs", type=int, default=5, help="timed pairs of A and B")
    p.add_argument("--autocast", type=int, default=None, help="1: A under bfloat16 autocast, as published; default: on a GPU")
    p.add_argument("--json", help="write everything here")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.measure: print(measured(device=device, **json.loads(a.measure))); return 0
    width = a.width or (FULL if a.full else 32)
    if width == FULL and device == "cpu":
        print("the published sizes need a GPU: give --width 32 to run the same code on small networks", file=sys.stderr)
        return 2
    if odd := [v for v in a.variants if v not in VARIANTS]: p.error(f"{odd[0]!r}: give some of {', '.join(VARIANTS)}")
    main_process = Accelerator(cpu=device == "cpu").is_main_process
    say = lambda text: print(text, flush=True) if main_process else None
    autocast = device == "cuda" if a.autocast is None else bool(a.autocast)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    done = dict(device=where, torch=torch.__version__, command=" ".join(["python", "bench/train_step.py", *(argv or sys.argv[1:])]),
                autocast=autocast, pairs=a.pairs, cases=[])
    def save():
        if a.json and main_process: Path(a.json).write_text(json.dumps(done, indent=1) + "\n")
    say(f"{where}, torch {torch.__version__}")
    for teacher in (a.teachers or (list(PUBLISHED) if a.full else ["modelscope", "tiny"])) if set(a.parts) - {"size"} else ():
        c = case_of(teacher, width, a.frames, a.size, a.batch)
        say(f"\n{json.dumps(c)}")
        rows = compare(c, device, a.variants, set(a.parts), a.pairs, autocast, say)
        say("\n" + table(rows))
        done["cases"].append(dict(case=c, rows=rows))
        if "growth" in a.parts and teacher != "tiny":
            done["cases"][-1]["growth"] = grown = growth(c, device, max(2, a.pairs//2), autocast)
            for f in grown["fits"]: say(f"{f['what']:8} over {f['axis']:6} {f['exponent']:.2f} +- {f['error']:.2f}  {f['name']}")
        save()
    for teacher in PUBLISHED if "size" in a.parts and main_process else ():
        done.setdefault("sizes", []).append(published_size(teacher))
        base, *_ = rows = done["sizes"][-1]["rows"]
        say(f"\n{teacher} at full size, counted")
        for r in rows: say(f"    {r['bytes']/GB:6.1f} GB, {r['bytes']/base['bytes']:.2f} of A; {sum(r['flops'].values())/1e12:6.1f} TFLOP, "
                           f"{sum(r['flops'].values())/sum(base['flops'].values()):.2f} of A  {r['name']}")
        save()
    return 0


if __name__ == "__main__": sys.exit(main())
