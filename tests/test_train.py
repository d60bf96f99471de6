"Training: the objective on one and on two processes, kills and resumes, through the real commands"
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import launching
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import t2v_turbo.precision as precision
from t2v_turbo import train
from t2v_turbo.checkpoints import CannotSave
from t2v_turbo.config import objective_of
from t2v_turbo.core import make_gen
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.cache import TextCache
from t2v_turbo.data.sources import open_source
from t2v_turbo.distill import Objective, draw
from t2v_turbo.files import UserError
from t2v_turbo.pipeline import T2VTurboPipeline, sample_student
from t2v_turbo.saved import load_student
from t2v_turbo.standins import tiny_modelscope, tiny_wan
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.teachers.wan import save_wan
from t2v_turbo.train import Config, Trainer

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
ONE_STEP = """
import sys, torch
from t2v_turbo.train import Config, Trainer
out, where, pieces = sys.argv[1:]
trainer = Trainer(Config(out=out, batch=8, rank=4, seed=3, accumulate=int(pieces), track=""))
with torch.no_grad():                      # away from B = 0, so that every weight has a gradient
    gen = torch.Generator().manual_seed(0)
    for p in trainer.params: p.add_(.02 * torch.randn(p.shape, generator=gen))
row = trainer.backward()
if trainer.accelerator.is_main_process:
    n = trainer.accelerator.num_processes
    torch.save(dict(n=n, row=row, grads=[p.grad for p in trainer.params]), where)
"""


def launch(n, script, *args):
    "n gloo processes; accelerate's own launcher starts several CPU processes through MPI only"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    cmd = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n),
           "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return subprocess.run([*cmd, str(script), *map(str, args)], env=ENV, capture_output=True, text=True, timeout=300)


def test_the_objective_does_not_depend_on_processes_or_pieces(tmp_path):
    "1, 2 and 4 gloo processes, with and without accumulation: loss and gradient of one process, to 1e-5"
    script = tmp_path / "one_step.py"; script.write_text(ONE_STEP)
    got = {}
    for n, pieces in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
        run = launch(n, script, tmp_path / "out", tmp_path / "got.pt", pieces)
        assert run.returncode == 0, run.stderr[-2000:]
        got[n, pieces] = torch.load(tmp_path / "got.pt", weights_only=True)
        assert got[n, pieces]["n"] == n
    one = got.pop((1, 1))
    assert all(g.abs().sum() > 0 for g in one["grads"])
    for other in got.values():
        assert other["row"].keys() == one["row"].keys()
        for k, v in one["row"].items(): assert abs(v - other["row"][k]) < 1e-5, k
        for a, b in zip(one["grads"], other["grads"]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def distill(out, *more, wait=True):
    cmd = [sys.executable, "-m", "t2v_turbo.cli", "distill", "--out", str(out), "--steps", "8", "--batch", "2",
           "--rank", "4", "--save_every", "2", "--eval_every", "0", "--repeats", "1", "--track", "", *more]
    p = subprocess.Popen(cmd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return p.communicate(timeout=900) + (p.returncode,) if wait else p


WHOLE = """
import sys
from t2v_turbo.train import Config, Trainer
for _ in Trainer(Config(out=sys.argv[1], steps=8, batch=2, rank=4, save_every=2, track="")).fit(): pass
"""


def test_killed_and_resumed_is_bit_identical(tmp_path):
    "The command, killed and started again, against a training in Python that nobody disturbs"
    run = subprocess.run([sys.executable, "-c", WHOLE, str(tmp_path / "whole")], env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    p, log = distill(tmp_path / "cut", wait=False), tmp_path / "cut" / "log.jsonl"
    for _ in range(1200):                       # kill it as soon as it has done three steps
        if log.is_file() and len(log.read_text().splitlines()) >= 3: break
        time.sleep(.1)
    p.send_signal(signal.SIGKILL); p.wait()
    assert (tmp_path / "cut" / "run.lock").is_file() and not (tmp_path / "cut" / "results.json").is_file()
    out, err, rc = distill(tmp_path / "cut")
    assert rc == 0, err[-2000:]
    assert "resumed at step" in out
    a, b = (load_file(tmp_path / d / "student" / "adapter_model.safetensors") for d in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(l) for l in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("whole", "cut")]
    assert [r["step"] for r in logs[1]] == list(range(1, 9))
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    rows = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert [(r["model"], r["steps"], r["nfe"]) for r in rows] == [("teacher", 50, 100), ("cd", 4, 4), ("turbo", 4, 4)]
    for r in rows: assert {"seconds_per_video", "judges", "mean"} <= r.keys()
    page = (tmp_path / "cut" / "report.html").read_text()
    assert "Finished and judged, step 8 of 8" in page and page.count('aria-label="turbo, 4 steps: ') == 6 and "<h3>Resume</h3>" in page


def rows_of(out): return [json.loads(l) for l in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [dict(lora_dropout=.1, lr_schedule="cosine", warmup=2, rank=4), dict(rank=0, lr_schedule="linear", ema=.5, lr=1e-4)], ids=["dropout", "full"])
def test_stopped_and_resumed_to_the_bit(tmp_path, more):
    "Dropout, schedules with a warm-up, and full fine-tuning: two steps and two more are four, in other pieces too"
    cfg = Config(out=str(tmp_path / "a"), steps=4, batch=2, track="", **more)
    for _ in Trainer(cfg).fit(): pass
    def again(**new):
        t = Trainer(replace(cfg, out=str(tmp_path / "b"), **new))
        assert t.resume() or not (tmp_path / "b/checkpoints").exists()
        return t
    rows = again().fit(); next(rows); next(rows); rows.close()
    for _ in (t := again()).fit(): pass
    a, b = (load_file(next((tmp_path / d / "student").glob("*.safetensors"))) for d in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and len(a) == len(t.params)
    assert [r["loss"] for r in rows_of(tmp_path / "a")] == [r["loss"] for r in rows_of(tmp_path / "b")]
    with pytest.raises(UserError, match="made with other settings"):
        Trainer(replace(cfg, out=str(tmp_path / "b"), warmup=1)).resume()


def test_dropout_drops_in_training_alone(tmp_path):
    "Other masks in each step, the same in other pieces, none in samples; 0 is the run without"
    def grads(p, pieces=1, step=0):
        t = Trainer(Config(out=str(tmp_path), batch=4, rank=4, seed=3, accumulate=pieces, track="", lora_dropout=p, objective=Objective(beta_img=0., beta_vid=0.)))
        with torch.no_grad():
            for q in t.params: q.add_(.02 * torch.randn(q.shape, generator=make_gen(0)))
        t.step = step
        row, z = t.backward(read=t.source.batch(0, 4)), torch.zeros(1, *t.student.teacher.latent_shape)
        ctx = t.student.teacher.encode_text(["a red fish moving left in the sea"])
        return row["loss"], torch.cat([q.grad.flatten() for q in t.params]), t.student(z + 1, torch.tensor([500]), ctx, torch.ones(1)).detach()
    (l0, g0, x0), (l1, g1, x1), (l2, g2, _), (l3, _, _) = grads(0.), grads(.1), grads(.1, 2), grads(.1, step=1)
    assert l0 != l1 and l1 != l3 and torch.equal(x0, x1)
    assert abs(l1 - l2) < 1e-5 and (g1 - g2).norm() < 1e-4 * g1.norm() and (g1 - g0).norm() > 1e-3 * g0.norm()


TWO_STEPS = launching.MOVED + """t = Trainer(Config(out=where, steps=2, batch=2, seed=3, lr=1e-4, track="", objective=Objective(beta_vid=0.), **more))
rows = [dict(row) for row in t.fit()]
params = [whole(p.detach()) for p in t.params]
if t.accelerator.is_main_process:
    torch.save(dict(n=t.accelerator.num_processes, sharded=t.sharded, rows=rows, params=params), where + ".pt")
"""


@pytest.mark.parametrize("more, engines", [(dict(rank=0), ["ddp"]), (dict(rank=4, lora_dropout=.3), ["ddp", "fsdp2"])], ids=["full", "dropout"])
def test_two_processes_take_the_steps_of_one(tmp_path, more, engines):
    "Every weight, or LoRA under dropout, sharded or not: losses of two steps to 1e-5, and the same weights"
    script = tmp_path / "two.py"; script.write_text(TWO_STEPS)
    words = lambda name, more=more: (tmp_path / name, json.dumps(more), ROOT / "tests")
    got = lambda name: torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert subprocess.run([sys.executable, script, *map(str, words("one"))], env=ENV, timeout=300).returncode == 0
    one = got("one")
    for name in engines:
        if name == "fsdp2": launching.launch(name, script=script, more=words(name))
        else: assert (run := launch(2, script, *words(name))).returncode == 0, run.stderr[-2000:]
        two = got(name)
        assert (two["n"], two["sharded"]) == (2, name == "fsdp2") and len(two["rows"]) == len(one["rows"]) == 2
        for a, b in zip(one["rows"], two["rows"]): assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * a["grad_norm"]
        assert sum((p - q).square().sum() for p, q in zip(one["params"], two["params"])) < 1e-6 * sum(p.square().sum() for p in one["params"])
    if "lora_dropout" not in more: return
    assert subprocess.run([sys.executable, script, *map(str, words("none", more | dict(lora_dropout=0.)))], env=ENV, timeout=300).returncode == 0
    assert all(abs(a["loss"] - b["loss"]) > 1e-3 for a, b in zip(one["rows"], got("none")["rows"]))        # masks are seen in the loss


def test_a_full_student_leaves_its_folder_as_any_other(tmp_path):
    "Saved, loaded, judged against its own teacher and sampled as a pipeline"
    t = Trainer(Config(out=str(tmp_path / "o"), steps=1, batch=2, rank=0, lr=1e-4, track=""))
    before = {n: p.clone() for n, p in t.student.frozen.state_dict().items()}
    for row in t.fit(): assert row["grad_norm"] > 0
    assert all(torch.equal(p, before[n]) for n, p in t.student.frozen.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "o/student").iterdir()) == ["denoiser.safetensors", "student.json"]
    pipe = T2VTurboPipeline.from_pretrained(tmp_path / "o/student")
    pipe.set_progress_bar_config(disable=True)
    want = sample_student(t.student, ["a red fish moving left in the sea"], make_gen(1))
    got = pipe("a red fish moving left in the sea", generator=make_gen(1), output_type="pt").frames
    torch.testing.assert_close(got.movedim(1, 2), want, rtol=1e-3, atol=1e-3)
    pipe.save_pretrained(tmp_path / "pipe")
    again = T2VTurboPipeline.from_pretrained(tmp_path / "pipe")
    assert all(torch.equal(p, q) for p, q in zip(again.denoiser.parameters(), pipe.denoiser.parameters()))


def test_full_fine_tuning_that_cannot_be(tmp_path, monkeypatch):
    "Sharded, or on a GPU that is too small: one sentence, and no folder"
    engine = train.choose_engine(str(tmp_path / "o"))
    monkeypatch.setattr(type(engine), "sharded", True)
    with pytest.raises(UserError, match="which FSDP does not shard: give a LoRA rank"): Trainer(Config(out=str(tmp_path / "o"), rank=0, track=""))
    assert not (tmp_path / "o").exists()


def test_unshareable_batch_is_refused(tmp_path):
    script = tmp_path / "odd.py"
    script.write_text("from t2v_turbo.cli import main\nraise SystemExit(main(['distill', '--batch', '3', "
                      f"'--out', {str(tmp_path / 'o')!r}]))")
    run = launch(2, script)
    assert run.returncode != 0 and "batch 3 cannot be shared by 2 processes" in run.stderr
    assert not (tmp_path / "o").exists()


CACHED = """
import sys, torch
from dataclasses import replace
from t2v_turbo import train
from t2v_turbo.config import objective_of
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.cache import open_cache
from t2v_turbo.data.recipes import dice
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import World
d, teacher, where = sys.argv[1], load_teacher("tiny"), dict(batch=4, progress=False)
build_cache("latents", teacher, World(), f"{d}/lat", 8, shard=1, dtype="float32", **where)
build_cache("text", teacher, World(), f"{d}/txt", 8, dtype="float32", **where)
build_cache("pairs", teacher, open_cache(f"{d}/lat"), f"{d}/pairs", shard=1, dtype="float32", **where)
draw = train.draw
def drawn(cfg, shape, gen):                                # a cache of answers has numbers of its own: every step gets those
    noise, index = dice(0, 1, shape, 50)
    return replace(draw(cfg, shape, gen), noise=noise, index=index)
train.draw = drawn
def step(**more):
    t = Trainer(Config(out=f"{d}/out", batch=4, rank=4, track="", objective=objective_of("tiny", k=20), **more))
    with torch.no_grad():
        gen = torch.Generator().manual_seed(0)
        for p in t.params: p.add_(.02 * torch.randn(p.shape, generator=gen))
    t.step = 1                                             # the second batch of each cache
    row = t.backward()
    return dict(row=row, grads=[p.grad for p in t.params])
lat, txt = dict(data=f"{d}/lat"), dict(texts=f"{d}/txt")
torch.save(dict(plain=step(), latents=step(**lat), texts=step(**lat, **txt), pairs=step(data=f"{d}/pairs", **txt),
                memory=step(save_memory="all"), both=step(data=f"{d}/pairs", save_memory="decode,rewards", accumulate=2)), f"{d}/got.pt")
"""
SHARED = CACHED[:CACHED.index("build_cache(")] + CACHED[CACHED.index("draw = train.draw"):CACHED.index("lat, txt")] + """
got = step(data=f"{d}/pairs", texts=f"{d}/txt", accumulate=2)
if int(__import__("os").environ["RANK"]) == 0: torch.save(dict(shared=got), f"{d}/shared.pt")
"""


def test_caches_and_memory_switches_keep_the_objective(tmp_path):
    "Latents, embeddings and the teacher's answers from a cache; parts run again in backward: 1e-5 on loss and gradients"
    run = subprocess.run([sys.executable, "-c", CACHED, str(tmp_path)], env=ENV, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    (tmp_path / "shared.py").write_text(SHARED)
    run = launch(2, tmp_path / "shared.py", tmp_path)                     # and the same caches read by two processes, in pieces
    assert run.returncode == 0, run.stderr[-2000:]
    got = torch.load(tmp_path / "got.pt", weights_only=True) | torch.load(tmp_path / "shared.pt", weights_only=True)
    plain = got.pop("plain")
    assert got.keys() == {"latents", "texts", "pairs", "memory", "both", "shared"}
    for name, other in got.items():
        for k, v in plain["row"].items(): assert abs(v - other["row"][k]) < 1e-5, (name, k)
        for a, b in zip(plain["grads"], other["grads"]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


class Asked(dict):
    "Prompts that a text encoder, or a text cache, was asked for"
    def on(self, monkeypatch, owner, name):
        plain = getattr(owner, name)
        def ask(me, prompts):
            for p in prompts: self[p] = self.get(p, 0) + 1
            return plain(me, prompts)
        monkeypatch.setattr(owner, name, ask)


@pytest.mark.parametrize("where", ["encoder", "cache"])
def test_the_null_prompt_is_encoded_once(tmp_path, monkeypatch, where):
    "Three steps in two pieces of two clips: the empty prompt is asked for by one call of two, and what trains is the same to the bit"
    more = dict(steps=3, batch=4, accumulate=2, rank=2, track="", objective=Objective(beta_img=0., beta_vid=0.))
    if where == "cache":
        prompts = [p for i in range(3) for p in open_source("", 8, (64, 64), 8).batch(i, 4)[1]]
        build_cache("text", load_teacher("tiny"), prompts, tmp_path / "txt", dtype="float32", progress=False)
        more["texts"] = str(tmp_path / "txt")
    asked, rows = Asked(), []
    asked.on(monkeypatch, *{"encoder": (Teacher, "encode_text"), "cache": (TextCache, "__call__")}[where])
    for forget in (False, True):
        t = Trainer(Config(out=str(tmp_path / f"o{forget}"), **more))
        terms = t.terms
        def anew(*args): t.contexts.nulls.clear(); return terms(*args)
        if forget: t.terms = anew
        rows.append([(r["loss"], r["grad_norm"]) for r in t.fit()])
        assert asked.pop("") == (3 * 2 * 2 if forget else 2) and sum(asked.values()) == 3 * 4
        asked.clear()
    assert rows[0] == rows[1]


def test_the_student_is_not_called_with_the_targets_copies(tmp_path, monkeypatch):
    "An EMA target that is far away: a step under bf16 autocast, which keeps copies of weights, is that of float32 to bf16's rounding"
    def step(precision):
        AcceleratorState._reset_state(True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        t = Trainer(Config(out=str(tmp_path / precision), batch=2, rank=2, ema=.5, track="", objective=Objective(beta_img=0., beta_vid=0.)))
        assert t.accelerator.mixed_precision == precision
        gen = make_gen(3)
        for p in t.engine.ema.shadow_params: p.add_(.1 * torch.randn(p.shape, generator=gen))
        return t.backward()["cd"], torch.cat([p.grad.flatten() for p in t.params])
    try: (a, ga), (b, gb) = step("no"), step("bf16")
    finally: monkeypatch.undo(); AcceleratorState._reset_state(True)
    assert abs(a - b) < .05 * a and torch.cosine_similarity(ga, gb, dim=0) > .95, (a, b)


# ---- float16: the gradient is scaled, and the scale is part of a run

SIZES = dict(modelscope=4*16*32*32, videocrafter2=4*16*40*64, wan=16*21*60*104)     # numbers of the latents of one clip


def gradients(t, factor=1.):
    "Of a loss that is multiplied by `factor`, and divided by it again: by anyone's own `backward`"
    z = torch.randn(1, *t.student.teacher.video_shape, generator=make_gen(1)).sigmoid()
    out = t.terms(z, ["a red fish moving left in the sea"], draw(t.cfg.objective, (1, *t.student.teacher.latent_shape), make_gen(0)))
    got = {}
    for name, n in dict(SIZES, own=math.prod(t.student.teacher.latent_shape)).items():
        small = min(1., math.prod(t.student.teacher.latent_shape) / n)
        for p in t.params: p.grad = None
        (out.loss.mean() * small).backward(retain_graph=True)
        got[name] = {k: p.grad / small for k, p in t.student.trainable().items()}
    return got


def stirred(t):
    "As after some training: nothing is zero"
    for n, p in t.student.trainable().items():
        if not n.endswith("lora_A.default.weight"): p.data = .02 * torch.randn(p.shape, generator=make_gen(len(n)))
    return t


@pytest.mark.parametrize("layout", ["unet", "wan", "rewards"])
def test_float16_gradients(tmp_path, layout):
    "At the size of each published model: cosine with float32 above .98 (.988 to .997, by the CPU), and no tensor that gets none"
    b = float(layout == "rewards")                             # the decoder and both rewards in float16, too
    more = dict(rewards={}, wan=dict(teacher=str(save_wan(tiny_wan(), tmp_path / "wan"))),
                unet=dict(teacher=str(tiny_modelscope(tmp_path / "ms")), frames=8, height=32, width=32))[layout]
    make = lambda dtype: stirred(Trainer(Config(out=str(tmp_path / dtype), dtype=dtype, rank=4, batch=1, track="", **more,
                                                objective=Objective(beta_img=b, beta_vid=b))))
    want, half = gradients(make("float32"))["own"], make("float16")
    assert half.engine.precision.scaled and {p.dtype for p in half.params} == {torch.float32}
    for name, got in gradients(half).items():
        a, c = (torch.cat([v.flatten() for v in x.values()]) for x in (want, got))
        assert torch.cosine_similarity(a, c, 0) > .98 and .98 < c.norm() / a.norm() < 1.02, name
        assert not [n for n in want if want[n].any() and not got[n].any()], name


def test_float16_gradients_need_their_scale(tmp_path):
    "The test above would fail without it"
    t = stirred(Trainer(Config(out=str(tmp_path / "o"), teacher=str(tiny_modelscope(tmp_path / "ms")), frames=8, height=32, width=32,
                               dtype="float16", rank=4, batch=1, track="", objective=Objective(beta_img=0., beta_vid=0.))))
    t.engine.precision.scale = 1.
    got = gradients(t)["wan"]
    assert sum(not g.any() for g in got.values()) > 4


def test_other_precisions_are_not_scaled(tmp_path):
    for dtype in ("float32", "bfloat16"):
        t = Trainer(Config(out=str(tmp_path / dtype), dtype=dtype, rank=2, batch=1, track="", objective=Objective(beta_img=0., beta_vid=0.)))
        assert not t.engine.precision.scaled and not any(p._backward_hooks for p in t.params) and t.state()["scale"] is None


def test_a_loss_beside_the_step_is_not_divided(tmp_path):
    t = stirred(Trainer(Config(out=str(tmp_path), dtype="float16", rank=2, batch=1, track="", objective=Objective(beta_img=0., beta_vid=0.))))
    t.backward()
    for p in t.params: p.grad = None
    sum(p.sum() for p in t.params).backward()
    assert all((p.grad == 1).all() for p in t.params)


def test_mixed_precision_fp16(tmp_path, monkeypatch):
    "The launcher's fp16: float32 weights, float16 arithmetic, on a CPU too"
    def step(precision):
        AcceleratorState._reset_state(True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        t = stirred(Trainer(Config(out=str(tmp_path / precision), batch=2, rank=2, track="")))
        return t, t.backward()["loss"], torch.cat([p.grad.flatten() for p in t.params])
    try: (_, a, ga), (t, b, gb) = step("no"), step("fp16")
    finally: monkeypatch.undo(); AcceleratorState._reset_state(True)
    assert t.engine.precision.scaled and t.accelerator.scaler is None
    assert 0 < abs(a - b) < .01 * abs(a) and torch.cosine_similarity(ga, gb, dim=0) > .99


OVERFLOW = """
import json, os, sys
from t2v_turbo import precision
from t2v_turbo.train import Config, Objective, Trainer
out, stop = sys.argv[1], int(sys.argv[2])
precision.START, precision.GROWTH = 2.**20, 2                  # too high for a reward in float16, which has no numbers above 65504
t = Trainer(Config(out=out, steps=10, batch=4, rank=2, save_every=1, max_skipped=2, dtype="float16", track="", objective=Objective(beta_vid=0.)))
t.resume()
for row in t.fit():
    if row["step"] == stop: os._exit(9)                        # as if killed
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_float16_with_overflows_goes_on_to_the_bit(tmp_path, processes):
    "The scale comes down, which ends nothing, and goes up again; killed on the way down and after it, the run is the undisturbed one"
    script = tmp_path / "overflow.py"; script.write_text(OVERFLOW)
    assert launch(processes, script, tmp_path / "whole", 0).returncode == 0
    for stop in (2, 6): assert launch(processes, script, tmp_path / "cut", stop).returncode != 0
    last = launch(processes, script, tmp_path / "cut", 0)
    assert last.returncode == 0, last.stderr[-2000:]
    rows, cut = ([json.loads(l) for l in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("whole", "cut"))
    keys = ("step", "loss", "grad_norm", "scale", "skipped")
    assert [[r[k] for k in keys] for r in rows] == [[r[k] for k in keys] for r in cut]
    scale, calm, over = 2.**20, 0, [r["grad_norm"] is None for r in rows]
    for r in rows:                                             # halved by every overflow, doubled by two steps without one
        assert r["scale"] == scale, rows
        calm = 0 if r["grad_norm"] is None else (calm + 1) % 2
        scale *= .5 if r["grad_norm"] is None else 1 if calm else 2
    assert over[:3] == [True] * 3 and not all(over) and any(b["scale"] > a["scale"] for a, b in zip(rows, rows[1:])), rows
    assert (down := sum(over)) == rows[-1]["skipped"]
    states = [torch.load(tmp_path / d / "checkpoints" / "step-00000010.pt", weights_only=True) for d in ("whole", "cut")]
    assert states[0]["scale"] == states[1]["scale"] and states[0]["skipped"] == down
    for part in ("params", "optimizer"):
        a, b = (tree_leaves(s[part]) for s in states)
        assert len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))
    a, b = (load_file(tmp_path / d / "student" / "adapter_model.safetensors") for d in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_gradient_that_is_too_large_at_any_scale_ends_the_run(tmp_path, monkeypatch):
    "With the scale at 1 an infinite gradient is the run's own"
    monkeypatch.setattr(precision, "START", 4.)
    huge = lambda frames, prompts: frames.sum((1, 2, 3, 4)) * 1e30
    t = Trainer(Config(out=str(tmp_path), steps=9, batch=2, rank=2, max_skipped=2, dtype="float16", track="",
                       objective=Objective(beta_img=0., shape="raw")), video_reward=huge)
    with pytest.raises(UserError, match="no finite loss in 2 steps in a row, now step 4"): list(t.fit())
    assert t.skipped == 4 and t.engine.precision.scale == 1


# ---- to the very end, with the options that one gets without asking

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHED = dict(accelerate="accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --main_process_port 0",
                alone="accelerate.commands.accelerate_cli launch --num_processes 1",
                torchrun="torch.distributed.run --standalone --nproc_per_node 2")


@pytest.mark.parametrize("how", LAUNCHED)
def test_launched_with_default_options_to_the_report(tmp_path, how):
    "Nothing is gathered after the end: the tracker is closed, the processes leave in any order, exit 0 and a report"
    assert re.search(r"accelerate launch --multi_gpu --num_processes \d+ -m t2v_turbo.cli distill", README)  # started here on 2 CPUs
    out = tmp_path / "o"
    run = subprocess.run([sys.executable, "-m", *LAUNCHED[how].split(), "-m", "t2v_turbo.cli", "distill", "--steps", "2", "--repeats", "1",
                          "--out", str(out)], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Traceback" not in run.stderr and f"{1 if how == 'alone' else 2} process(es)" in run.stdout, run.stderr[-3000:]
    assert "Finished and judged" in (out / "report.html").read_text() and json.loads((out / "results.json").read_text())
    assert [*(out / "tracking").rglob("events.out.tfevents*")] and not (out / "run.lock").exists()


def test_a_trainer_can_be_asked_after_its_end(tmp_path):
    "What is gathered may be asked for after `fit`, and the run can be resumed and ended again"
    t = Trainer(Config(out=str(tmp_path), steps=1, batch=2, rank=2, objective=Objective(beta_img=0., beta_vid=0.)))
    for _ in t.fit(): pass
    assert t.left_out() == [] and t.accelerator.trackers == [] and t.state()["step"] == 1
    assert t.resume() and list(t.fit()) == []


# ---- a checkpoint knows what it depends on by content

@pytest.mark.parametrize("part", ["vae", "text_encoder", "image reward", "video reward"])
def test_a_swapped_network_under_the_same_name_is_refused(tmp_path, monkeypatch, part):
    small = dict(steps=1, batch=2, rank=2, track="")
    for _ in Trainer(Config(out=str(tmp_path), **small)).fit(): pass
    assert Trainer(Config(out=str(tmp_path), **small)).resume()
    def spoil(net):
        p = max(net.parameters(), key=torch.Tensor.numel)          # one number of many
        with torch.no_grad(): p.view(-1)[7] += .5
    teacher, model = Trainer._teacher, Trainer._model
    def other_teacher(self):
        t = teacher(self)
        if part in ("vae", "text_encoder"): spoil(getattr(t, part))
        return t
    def other_rewards(self, *given):
        m = model(self, *given)
        if part.endswith("reward"): spoil(getattr(m, part.replace(" ", "_")))
        return m
    monkeypatch.setattr(Trainer, "_teacher", other_teacher); monkeypatch.setattr(Trainer, "_model", other_rewards)
    t = Trainer(Config(out=str(tmp_path), **small))
    with pytest.raises(UserError, match=f"was made with another {'teacher .' + part if ' ' not in part else part}.*give the files that"): t.resume()
    store = t.store
    for step in store.steps():                                     # an older checkpoint, which does not know
        state = store.load(step); del state["identity"], state["scale"]; store.save(step, state)
    assert t.resume()


def as_before(state):
    "The checkpoint as the version before wrote it: no format, and settings that were no options yet"
    del state["format"], state["identity"], state["scale"], state["clips"]
    for n in ("lr_schedule", "mix", "missing", "variant"): del state["config"][n]
    del state["config"]["objective"]["window"]; state["config"]["objective"]["video_frames"] = 8


def test_a_checkpoint_of_the_version_before(tmp_path):
    "A run that is not finished would go on with other noise, so it is refused in one sentence; a finished one is read"
    make = lambda steps, **more: Trainer(Config(out=str(tmp_path), steps=steps, batch=2, rank=2, track="", **more))
    t = make(1)
    for _ in t.fit(): pass
    store = t.store; state = store.load(1); as_before(state); store.save(1, state)
    with pytest.raises(UserError, match="step-00000001.pt' is of an earlier version, which drew the noise of each step from other seeds: finish this run "
                                        "with the version that began it, and there is no earlier one"): make(2).resume()
    assert make(1).resume() and make(1, objective=objective_of("tiny", video_frames=8)).resume()      # what 0, the default, comes to
    for more in (dict(lr_schedule="constant"), dict(objective=objective_of("tiny", image_frames=1)), dict(objective=objective_of("tiny", window=8))):
        with pytest.raises(UserError, match="made with other settings"): make(1, **more).resume()
    state["format"] = 99; store.save(1, state)
    with pytest.raises(UserError, match="is of a later version .*: update the package"): make(1).resume()


def test_a_student_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    "safetensors has an error of its own for a full disk"
    t = Trainer(Config(out=str(tmp_path / "o"), batch=2, rank=2, track="", objective=Objective(beta_img=0., beta_vid=0.)))
    def full(*a): raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("t2v_turbo.train.save_student", full)
    with pytest.raises(CannotSave, match="No space left on device.*make room"): t.save()
    assert t.store.steps() == [0]


@pytest.mark.parametrize("name, text", [("student.json", None), ("student.json", "{"), ("student.json", "{}"), ("student.json", "[]"),
                                        ("adapter_config.json", "{"), ("adapter_config.json", None)])
def test_a_damaged_student_is_named(tmp_path, name, text):
    shutil.copytree(WEIGHTS / "tiny-cd", tmp_path / "s")
    (tmp_path / "s" / name).unlink() if text is None else (tmp_path / "s" / name).write_text(text)
    with pytest.raises(UserError, match="no student in|is damaged"): load_student(tmp_path / "s")
