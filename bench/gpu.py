"""Step time and peak memory of every recipe at full size, beside `plan`, with random weights, on one GPU.

    python bench/gpu.py                          # all rows; run it again to resume, --again KEY measures a row anew
    python bench/gpu.py --rows modelscope        # rows whose key holds a word, or whole keys
    python bench/gpu.py --list                   # keys of the rows
    python bench/gpu.py --small --rows train     # the same code on small networks; runs on a CPU, in float32 there
    python bench/gpu.py --json gpu.json          # rows as json, and as a table in gpu.md beside it

This script has not run on a GPU yet: there was none where it was written. `--small` runs in the tests.

Rows, each in a process of its own, so that one that runs out of memory is recorded as such and the next one starts afresh:
train      optimiser steps of a recipe with the library's own `Trainer`: published sizes, random weights, random clips or cached latents;
           in bfloat16 and in float16, as it is and with the denoiser compiled (without LoRA dropout, whose masks cannot be). Clips, captions and caches are in memory, so reading data is not
           measured. `GB` is the allocator's peak, `plan` is what `t2v-turbo plan` predicts of the same step. A recipe for several GPUs is measured
           with the clips of one of them.
published  a step of the published recipe, written from the equations (bench/train_step.py), at the same sizes, one clip; ModelScopeT2V and VideoCrafter2
sample     seconds a clip and peak of the teacher in 50 guided steps, and of a student in 4; with the VAE and the text encoder
"""
import argparse
import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn

from t2v_turbo.config import Config
from t2v_turbo.core import make_gen
from t2v_turbo.distill import Objective
from t2v_turbo.dryrun import HUB, Rehearsal, memory_of
from t2v_turbo.files import UserError, write_json
from t2v_turbo.fit import GB
from t2v_turbo.hub import split_name
from t2v_turbo.memory import savings_of
from t2v_turbo.meter import Meter
from t2v_turbo.pipeline import sample_student, sample_teacher
from t2v_turbo.plan import planned_defaults, reward_on_meta, teacher_on_meta
from t2v_turbo.recipes import RECIPES
from t2v_turbo.rewards.base import mix
from t2v_turbo.rewards.names import kind_of_reward, parse_reward
from t2v_turbo.small import small_rewards, small_teacher
from t2v_turbo.solver import TeacherAnswer
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Trainer

DTYPES = ("bfloat16", "float16")
OOM = "out of memory"


# ---- the rows

def recipes():
    "Names of the recipes of published teachers"
    return [n for n in RECIPES if RECIPES[n].settings["teacher"] != "tiny"]


def teacher_of(name):
    "The plan's name of the teacher of a recipe"
    given = RECIPES[name].settings["teacher"]
    return HUB[split_name(given)[0]] if split_name(given) else given


def keys():
    "All rows, in the order in which they are measured"
    teachers = list(dict.fromkeys(map(teacher_of, recipes())))
    train = [f"train {r} {d}{c}" for r in recipes() for d in DTYPES for c in ("", " compile")]
    return [*train, *(f"published {t}" for t in teachers if t in train_step().PUBLISHED), *(f"sample {t} {d}" for t in teachers for d in DTYPES)]


def train_step():
    "bench/train_step.py, which has the published recipe"
    if "bench_train_step" not in sys.modules:
        spec = importlib.util.spec_from_file_location("bench_train_step", Path(__file__).with_name("train_step.py"))
        sys.modules["bench_train_step"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["bench_train_step"]


# ---- networks

def filled(net, device):
    "A network of `meta` with memory and random weights on a device"
    if device == "meta" or net is None: return net
    net.to_empty(device=device)
    with torch.no_grad():
        for n, p in net.named_parameters():
            if p.ndim > 1: p.normal_(0, .02)
            else: p.fill_(1. if n.endswith("weight") else 0.)
        for n, b in net.named_buffers(): b.fill_(1 if n.endswith("latent_std") else 0)
    return net


def settings_of(name, dtype, compiled):
    "The `Config` of a recipe whose teacher and rewards are given as objects, and the rest of its settings"
    s, own = dict(RECIPES[name].settings), asdict(planned_defaults(teacher_of(name)))
    gpus = int((re.search(r"-(\d+)x$", name) or [0, 1])[1])
    mine, goals = {f.name for f in fields(Config)}, {f.name for f in fields(Objective)}
    objective = Objective(**{k: v for k, v in (own | s).items() if k in goals})
    apart = ("teacher", "variant", "reward", "vocabulary", "data", "texts", "fps", "frames", "height", "width", "objective")
    given = {k: v for k, v in ({n: own[n] for n in ("lr", "lr_schedule", "rank")} | s).items() if k in mine and k not in apart}
    if compiled: given["lora_dropout"] = 0.
    given |= dict(dtype=dtype, compile=int(compiled), batch=s["batch"]//gpus, steps=10_000, track="", objective=objective)
    return given, s


class Given:
    "Random clips, latents or answers of the teacher, in memory, with captions"
    def __init__(self, kind, teacher):
        self.kind, self.shapes = kind, (teacher.video_shape, teacher.latent_shape)

    def fingerprint(self): return "random"

    def batch(self, step, size, rows=slice(None)):
        n = len(range(size)[rows])
        shape = self.shapes[self.kind != "clips"]
        x = torch.rand(n, *shape, generator=make_gen(step))
        return TeacherAnswer(x, torch.zeros(n, dtype=torch.long), x, x) if self.kind == "pairs" else x, [f"clip {i}" for i in range(n)]


class Words:
    "In place of a cache of texts: random contexts of one length, and no text encoder"
    def __init__(self, shape, device): self.shape, self.device, self.captions, self.where = shape, device, [""], {}
    def fingerprint(self): return "random"
    def __call__(self, prompts): return torch.full((len(prompts), *self.shape), .1, device=self.device)


def networks(name, cfg, s, device, small, folder):
    "Teacher, image reward and video reward of a recipe, with the sizes of its settings, on a device"
    dtype, saved, texts = getattr(torch, cfg["dtype"]), "rewards" in savings_of(cfg.get("save_memory", "")), s.get("reward", planned_defaults(teacher_of(name)).reward)
    size = (s["height"], s["width"]) if s.get("height") else None
    if small:
        kind = {"modelscope": "UNet3DConditionModel", "wan2.1-1.3b": "WanTransformer3DModel", "sana-2b": "SanaVideoTransformer3DModel"}.get(teacher_of(name), teacher_of(name))
        if not (folder/name).is_dir(): small_teacher(kind, folder/name)
        teacher, rewards = load_teacher(folder/name, dtype=dtype, frames=9), small_rewards(texts, dtype, saved)
        return (teacher.to(device), *(r if r is None else r.to(device) for r in rewards))
    teacher = filled(teacher_on_meta(teacher_of(name), s.get("frames") or None, size, dtype), device)
    found = dict(image={}, video={})
    for reward, weight, _ in map(parse_reward, texts.split(",")): found[kind_of_reward(reward)][filled(reward_on_meta(reward, dtype, saved), device)] = weight
    return (teacher, *(mix(v) if v else None for v in found.values()))


class Ours:
    "The trainer's own step on networks and data that are given"
    def given(self, teacher, kind, texts): self.made, self.kind, self.with_texts = teacher, kind, texts
    def _teacher(self): return self.made
    def _source(self, teacher): return Given(self.kind, teacher)
    def _contexts(self, teacher):
        contexts = super()._contexts(teacher)
        if self.with_texts:
            with torch.no_grad(), Meter(teacher.device.type): shape = teacher.encode_text([""]).shape[1:]   # it answers checks of values on `meta`
            contexts.texts, teacher.text_encoder = Words(shape, teacher.device), nn.Module()
        return contexts


class Measured(Ours, Trainer):
    def __init__(self, cfg, made, kind, texts):
        self.given(made[0], kind, texts)
        super().__init__(cfg, *made[1:])


class Counted(Ours, Rehearsal):
    "The same without values and device, for `plan`"
    def __init__(self, cfg, made, kind, texts):
        self.given(made[0], kind, texts)
        self.away, self.todo = {}, {}
        Trainer.__init__(self, cfg, *made[1:])
    def _model(self, image_reward, video_reward): return Trainer._model(self, image_reward, video_reward)


# ---- measuring

def now(device):
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def timed(run, device, repeats, warm=1):
    "Median seconds of a function after some that warm up, and the allocator's peak in GB; `None` on a CPU"
    for _ in range(warm): run()
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    many = []
    for _ in range(repeats):
        start = now(device)
        run()
        many.append(now(device) - start)
    return statistics.median(many), torch.cuda.max_memory_allocated()/GB if device == "cuda" else None


def train_row(name, dtype, compiled, a, device, folder):
    "One recipe: an optimiser step, and what `plan` predicts of it"
    given, s = settings_of(name, dtype if device == "cuda" else "float32", compiled)
    data = s.get("data", "")
    kind = next((k for k in ("latents", "pairs") if k in data), "clips")
    with tempfile.TemporaryDirectory() as out:
        cfg = Config(out=out, teacher="tiny", **given)
        if a.small: cfg = replace(cfg, rank=min(cfg.rank, 4), batch=min(cfg.accumulate, 2), accumulate=min(cfg.accumulate, 2))
        made = networks(name, given, s, "cpu" if a.small else "meta", a.small, folder)
        plan = memory_of(Counted(replace(cfg, compile=0), made, kind, "texts" in s))
        del made
        gc.collect()
        trainer = Measured(cfg, networks(name, given, s, device, a.small, folder), kind, "texts" in s)
        losses = []
        def step():
            read = trainer.source.batch(trainer.step, cfg.batch, trainer.rows)
            row = trainer.backward(read)
            trainer.update(row["bad"] > 0)
            losses.append(row["loss"])
        seconds, peak = timed(step, device, a.repeats, 1 + compiled)
    return dict(clips=cfg.batch, seconds=seconds, peak=peak, plan=plan.total/GB, loss=losses[-1])


def published_row(teacher, a, device):
    "One clip of the published recipe, under bfloat16 autocast"
    bench = train_step()
    c = bench.case_of(teacher, 8 if a.small else bench.FULL, *((8, (32, 64)) if a.small else ()))
    it = bench.Theirs(c, device, autocast=True)
    seconds, peak = timed(lambda: bench.step(it), device, a.repeats)
    return dict(clips=c["batch"], seconds=seconds, peak=peak)


def sample_row(teacher, dtype, a, device, folder):
    "One clip of the teacher, guided, and one of a student"
    name = next(r for r in recipes() if teacher_of(r) == teacher)
    given, s = settings_of(name, dtype if device == "cuda" else "float32", False)
    made, *_ = networks(name, given | dict(save_memory=""), s | dict(reward="tiny-image"), device, a.small, folder)
    steps, w = a.teacher_steps, planned_defaults(teacher).guidance
    seconds, peak = timed(lambda: sample_teacher(made, ["a prompt"], make_gen(0), steps, w), device, a.repeats)
    student = Student(made, 4)
    four, four_peak = timed(lambda: sample_student(student, ["a prompt"], make_gen(0), 4, w), device, a.repeats)
    return dict(clips=1, seconds=four, peak=four_peak, teacher_seconds=seconds, teacher_peak=peak, teacher_steps=steps)


def measure(key, a, device, folder):
    "One row; running out of memory is a result"
    kind, name, *how = key.split()
    try:
        if kind == "train": return train_row(name, how[0], "compile" in how, a, device, folder)
        if kind == "published": return published_row(name, a, device)
        return sample_row(name, how[0], a, device, folder)
    except (torch.OutOfMemoryError, MemoryError): return dict(failed=OOM)


def apart(key, a):
    "`measure` in a process of its own; any other error is recorded by its last line, too"
    own = ["--key", key, "--repeats", str(a.repeats), "--teacher_steps", str(a.teacher_steps), *["--small"]*a.small]
    run = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | dict(TQDM_DISABLE="1"))
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or [f"status {run.returncode}"]
    if run.returncode == 0: return json.loads(lines[-1])
    return dict(failed=OOM if run.returncode == -9 or "OutOfMemoryError" in run.stderr else lines[-1][:200])


# ---- the table

def table(done):
    "Markdown: one line a row, with the device's name above"
    cell = lambda v, how: "-" if v is None else format(v, how)
    head = ["row", "clips a step", "s", "GB", "plan GB", "GB / plan", "note"]
    lines = [f"{done['device']}, torch {done['torch']}{', small networks' if done['small'] else ''}, median of {done['repeats']}", "",
             "| " + " | ".join(head) + " |", "|" + " --- |"*len(head)]
    for key, r in done["rows"].items():
        peak, plan = r.get("peak"), r.get("plan")
        note = r.get("failed", "")
        if "teacher_seconds" in r: note = f"teacher in {r['teacher_steps']} steps: {r['teacher_seconds']:.3g} s, {r['teacher_seconds']/r['seconds']:.1f} times as long"
        lines.append(" | ".join([f"| {key}", cell(r.get("clips"), "d"), cell(r.get("seconds"), ".3g"), cell(peak, ".1f"), cell(plan, ".1f"),
                                 cell(peak/plan if peak and plan else None, ".2f"), f"{note} |"]))
    return "\n".join(lines)


def opened(path, about):
    "Rows of an earlier run of the same kind on the same device"
    if not path.is_file(): return about | dict(rows={})
    done = json.loads(path.read_text())
    if odd := [k for k in ("device", "small") if done.get(k) != about[k]]:
        raise UserError(f"{str(path)!r} is of another {odd[0]} ({done.get(odd[0])}, not {about[odd[0]]}): give another --json")
    return done


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rows", nargs="*", default=[], help="only these rows: whole keys, or words in them")
    p.add_argument("--again", nargs="*", default=[], help="keys of rows to measure again, although they are there")
    p.add_argument("--list", action="store_true", help="print the keys and stop")
    p.add_argument("--small", action="store_true", help="small networks of the same classes, in this process; runs on a CPU")
    p.add_argument("--repeats", type=int, default=5, help="timed steps or clips, after one that warms up")
    p.add_argument("--teacher_steps", type=int, default=50)
    p.add_argument("--json", default="gpu.json", help="rows, kept from one run to the next; the table is beside it, ending in .md")
    p.add_argument("--key", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.list: print("\n".join(keys())); return 0
    if device == "cpu" and not a.small:
        print("no GPU here: the published sizes need one; give --small to try the script on small networks", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if a.key: print(json.dumps(measure(a.key, a, device, Path(folder)))); return 0
        path = Path(a.json)
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        try: done = opened(path, dict(device=name, torch=torch.__version__, small=a.small, repeats=a.repeats))
        except UserError as e: print(e, file=sys.stderr); return 2
        every = keys()
        for key in [k for k in every if not a.rows or any(w == k or w in k and w not in every for w in a.rows)]:
            if key in done["rows"] and key not in a.again: continue
            row = done["rows"][key] = measure(key, a, device, Path(folder)) if a.small else apart(key, a)
            print(f"{key}: " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            write_json(path, done)
            path.with_suffix(".md").write_text(table(done) + "\n")
        print("\n" + table(done))
    return 0


if __name__ == "__main__": sys.exit(main())
