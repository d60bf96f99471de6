"Training: the objective on one and on two processes, kills and resumes, through the real commands"
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file

from t2v_turbo.caches import TextCache, build_cache
from t2v_turbo.checkpoints import CannotSave
from t2v_turbo.core import UserError, make_gen
from t2v_turbo.distill import Objective
from t2v_turbo.streams import open_source
from t2v_turbo.student import load_student
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.train import Config, Trainer

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
    return p.communicate(timeout=300) + (p.returncode,) if wait else p


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
    assert "<video" in (tmp_path / "cut" / "report.html").read_text()


def test_unshareable_batch_is_refused(tmp_path):
    script = tmp_path / "odd.py"
    script.write_text("from t2v_turbo.cli import main\nraise SystemExit(main(['distill', '--batch', '3', "
                      f"'--out', {str(tmp_path / 'o')!r}]))")
    run = launch(2, script)
    assert run.returncode != 0 and "batch 3 cannot be shared by 2 processes" in run.stderr
    assert not (tmp_path / "o").exists()


CACHED = """
import sys, torch
from t2v_turbo.caches import build_cache, open_cache
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import World
d, teacher, where = sys.argv[1], load_teacher("tiny"), dict(batch=4, progress=False)
build_cache("latents", teacher, World("train", 0, 8, 32), f"{d}/lat", 8, shard=1, dtype="float32", **where)
build_cache("text", teacher, World("train", 0, 8, 32), f"{d}/txt", 8, dtype="float32", **where)
build_cache("pairs", teacher, open_cache(f"{d}/lat"), f"{d}/pairs", shard=1, dtype="float32", **where)
def step(**more):
    t = Trainer(Config(out=f"{d}/out", batch=4, rank=4, track="", **more))
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
SHARED = CACHED[:CACHED.index("build_cache(")] + CACHED[CACHED.index("def step"):CACHED.index("lat, txt")] + """
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
        prompts = [p for i in range(3) for p in open_source("", 8, (32, 32), 8).batch(i, 4)[1]]
        build_cache("text", load_teacher("tiny"), prompts, tmp_path / "txt", dtype="float32", progress=False)
        more["texts"] = str(tmp_path / "txt")
    asked, rows = Asked(), []
    asked.on(monkeypatch, *{"encoder": (Teacher, "encode_text"), "cache": (TextCache, "__call__")}[where])
    for forget in (False, True):
        t = Trainer(Config(out=str(tmp_path / f"o{forget}"), **more))
        terms = t.terms
        def anew(*args): t.null.clear(); return terms(*args)
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
        for p in t.ema.shadow_params: p.add_(.1 * torch.randn(p.shape, generator=gen))
        return t.backward()["cd"], torch.cat([p.grad.flatten() for p in t.params])
    try: (a, ga), (b, gb) = step("no"), step("bf16")
    finally: monkeypatch.undo(); AcceleratorState._reset_state(True)
    assert abs(a - b) < .05 * a and torch.cosine_similarity(ga, gb, dim=0) > .95, (a, b)


def test_fp16_steps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(UserError, match="give --mixed_precision bf16 or no"): Trainer(Config(out=str(tmp_path / "o"), track=""))
    finally: monkeypatch.delenv("ACCELERATE_MIXED_PRECISION"); AcceleratorState._reset_state(True)
    assert not (tmp_path / "o").exists()


def test_a_student_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    "safetensors has an error of its own for a full disk"
    t = Trainer(Config(out=str(tmp_path / "o"), batch=2, rank=2, track="", objective=Objective(beta_img=0., beta_vid=0.)))
    def full(*a): raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(t.student, "save", full)
    with pytest.raises(CannotSave, match="No space left on device.*make room"): t.save()
    assert t.store.steps() == [0]


@pytest.mark.parametrize("name, text", [("student.json", None), ("student.json", "{"), ("student.json", "{}"), ("student.json", "[]"),
                                        ("adapter_config.json", "{"), ("adapter_config.json", None)])
def test_a_damaged_student_is_named(tmp_path, name, text):
    shutil.copytree(WEIGHTS / "tiny-cd", tmp_path / "s")
    (tmp_path / "s" / name).unlink() if text is None else (tmp_path / "s" / name).write_text(text)
    with pytest.raises(UserError, match="no student in|is damaged"): load_student(tmp_path / "s")
