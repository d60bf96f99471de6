"Faults of a long run, each injected: one clear sentence, an exit code that is not 0, and nothing lost"
import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest
import torch

import t2v_turbo.checkpoints as checkpoints
from t2v_turbo.checkpoints import Checkpoints, claim
from t2v_turbo.cli import main
from t2v_turbo.config import objective_of
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.cache import open_cache
from t2v_turbo.data.shards import Shards
from t2v_turbo.data.tars import write_shards
from t2v_turbo.files import UserError, atomic, sweep
from t2v_turbo.teachers.tiny import load_teacher, save_teacher
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import World

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SMALL = ["--steps", "4", "--batch", "2", "--rank", "2", "--save_every", "1", "--eval_every", "0", "--repeats", "1",
         "--beta_img", "0", "--beta_vid", "0", "--lr", "2e-4", "--track", ""]


def go_on(out):
    "Train to the end with the settings of `SMALL`; the step that it resumed at"
    t = Trainer(Config(out=str(out), steps=4, batch=2, rank=2, save_every=1, lr=2e-4, track="",
                       objective=objective_of("tiny", beta_img=0., beta_vid=0.)))
    with claim(out):
        t.resume(); at = t.step
        for _ in t.fit(): pass
    assert t.step == 4
    return at


def refused(capsys, *argv, code=2):
    "The one sentence on stderr of a call that must fail"
    assert main([str(a) for a in argv]) == code
    err = [l for l in capsys.readouterr().err.strip().splitlines() if l.startswith(("t2v-turbo: ", "stopped"))]
    assert len(err) == 1, err
    return err[0]


def run(script, *args, wait=True):
    p = subprocess.Popen([sys.executable, "-c", script, *map(str, args)], env=ENV, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    if not wait: return p
    out, err = p.communicate(timeout=300)
    assert "Traceback" not in err, err[-3000:]
    return p.returncode, err.strip().splitlines()[-1]


FULL_DISK = """
import resource, sys
from t2v_turbo import train
from t2v_turbo.cli import main
save = train.Trainer.save
def tight(self):                       # from the third step on no file can grow beyond 20 kB
    if self.step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return save(self)
train.Trainer.save = tight
sys.exit(main(sys.argv[1:]))
"""


def test_full_disk(tmp_path):
    code, said = run(FULL_DISK, "distill", "--out", tmp_path / "o", *SMALL)
    assert code == 2 and said.startswith("t2v-turbo: the checkpoint of step 3 cannot be written"), said
    assert said.endswith("make room and run again; the last good one is of step 2"), said
    store = Checkpoints(tmp_path / "o")
    assert store.steps() == [1, 2] and store.newest()[1]["step"] == 2
    assert not [*(tmp_path / "o").glob("**/.tmp-*")]
    assert go_on(tmp_path / "o") == 2                                          # there is room again


def test_full_disk_while_logging(tmp_path):
    "A disk that is full outside of a save ends in a sentence too"
    script = FULL_DISK.replace("def tight(self):", "def tight(self):\n    pass\ndef log(self, row):").replace(
        "    return save(self)\ntrain.Trainer.save = tight", "    return first(self, row)\nfirst = train.Trainer.log\ntrain.Trainer.log = log"
    ).replace("self.step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))",
              "self.step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))")
    code, said = run(script, "distill", "--out", tmp_path / "o", *SMALL)
    assert code == 2 and "cannot be written" in said, said
    assert Checkpoints(tmp_path / "o").newest()[0] == 2


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run of four steps"
    out = tmp_path_factory.mktemp("runs") / "done"
    assert go_on(out) == 0
    return out


def copy(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "o"))


def test_torn_checkpoint(done, tmp_path, capsys):
    out = copy(done, tmp_path); store = Checkpoints(out)
    assert store.steps() == [1, 2, 3, 4]
    store.path(4).write_bytes(store.path(4).read_bytes()[:999])
    with pytest.warns(UserWarning, match="step-00000004.pt' cannot be read .*; went back to step 3"):
        assert go_on(out) == 3
    for s in store.steps(): store.path(s).write_bytes(b"torn")
    before = sorted(p.name for p in out.iterdir())
    assert "no earlier one to use: choose another --out" in refused(capsys, "distill", "--out", out, *SMALL)
    assert sorted(p.name for p in out.iterdir()) == before


def test_checkpoint_of_another_teacher(done, tmp_path, capsys):
    out = copy(done, tmp_path); other = load_teacher("tiny")
    with torch.no_grad(): other.denoiser.patch_out.weight.mul_(2)
    save_teacher(other, tmp_path / "teacher")
    store = Checkpoints(out)
    for step in store.steps():                           # the same settings, but for the teacher's weights
        state = store.load(step); state["config"]["teacher"] = str(tmp_path / "teacher"); store.save(step, state)
    kept = {p.name: p.read_bytes() for p in (out / "checkpoints").iterdir()}
    said = refused(capsys, "distill", "--out", out, *SMALL, "--teacher", tmp_path / "teacher")
    assert "step-00000004.pt' was made with another teacher" in said
    assert kept == {p.name: p.read_bytes() for p in (out / "checkpoints").iterdir()}


def test_foreign_checkpoint_is_passed_over(done, tmp_path):
    out = copy(done, tmp_path); store = Checkpoints(out)
    state = store.load(4); state["config"]["lr"] = 7.; store.save(4, state)
    with pytest.warns(UserWarning, match=r"other settings \(lr\); went back to step 3"):
        assert go_on(out) == 3


NAN = """
import sys, torch
from t2v_turbo.train import Config, Objective, Trainer
from t2v_turbo.files import UserError
calls, when = 0, [int(x) for x in sys.argv[2].split(",")]
def reward(frames, prompts):
    global calls; calls += 1
    bad = frames.new_tensor([float("nan") if calls in when and i == 0 else 0. for i in range(len(frames))])
    return frames.mean((1, 2, 3, 4)) + bad
t = Trainer(Config(out=sys.argv[1], steps=8, batch=2, rank=2, save_every=100, max_skipped=3, track="",
                   objective=Objective(beta_img=0.)), video_reward=reward)
w = []
try:
    for row in t.fit(): w.append(t.params[1].sum().item()); print(row["step"], row["skipped"], flush=True)
except UserError as e: print(e, file=sys.stderr); sys.exit(2)
print(w[2] == w[1], w[3] != w[2])
"""


def test_nan_reward(tmp_path):
    p = subprocess.run([sys.executable, "-c", NAN, tmp_path / "a", "3,6"], env=ENV, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.split("\n")[:8] == [f"{i} {n}" for i, n in zip(range(1, 9), (0, 0, 1, 1, 1, 2, 2, 2))]
    assert p.stdout.split("\n")[8] == "True True"          # the weights stand still in step 3 and move in step 4
    rows = [json.loads(x) for x in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] is None for r in rows] == [i in (2, 5) for i in range(8)]
    code, said = run(NAN, tmp_path / "b", "2,3,4")
    assert code == 2 and said.startswith("no finite loss in 3 steps in a row, now step 4 (j_vid, r_vid is NaN or infinite)"), said
    assert Checkpoints(tmp_path / "b").newest()[0] == 4


SLOW_SAVE = """
import sys, time
from t2v_turbo import checkpoints
from t2v_turbo.cli import main
flush, save, now = checkpoints.os.fsync, checkpoints.Checkpoints.save, []
def slow(fd):
    if now == ["first"]: print("saving", flush=True); now.append("told"); time.sleep(2)
    return flush(fd)
def first(*args, **kw):
    now or now.append("first")
    return save(*args, **kw)
checkpoints.os.fsync, checkpoints.Checkpoints.save = slow, first
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_during_a_save(tmp_path, name, code):
    "The save is finished, the run ends after it, and the same command goes on from there"
    more = [*SMALL[2:], "--steps", "40", "--out", tmp_path / "o"]
    p = run(SLOW_SAVE, "distill", *more, wait=False)
    for line in p.stdout:
        if line.strip() == "saving": break
    p.send_signal(getattr(signal, name))
    out, err = p.communicate(timeout=120)
    assert p.returncode == code, err[-2000:]
    assert err.strip().splitlines()[-1] == f"stopped by {name} at step 1; the same command goes on from there"
    assert Checkpoints(tmp_path / "o").steps() == [1] and not (tmp_path / "o" / "run.lock").exists()


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "o", "/proc/t2v_turbo"):            # the second is read-only for root too
        assert "cannot write to the output folder" in refused(capsys, "distill", "--out", out, *SMALL)


def test_two_runs_into_one_folder(done, tmp_path, capsys):
    out = copy(done, tmp_path)
    p = run("import sys, time\nfrom t2v_turbo.checkpoints import claim\n"
            "with claim(sys.argv[1]): print('mine', flush=True); time.sleep(60)", out, wait=False)
    assert p.stdout.readline().strip() == "mine"
    seen = lambda: {f.name: f.stat().st_mtime_ns for f in out.iterdir() if f.name != "run.lock"}    # its owner touches that now and then
    before = seen()
    assert f"in use by another run (process {p.pid})" in refused(capsys, "distill", "--out", out, *SMALL)
    assert before == seen() and (out / "run.lock").exists()
    p.kill(); p.wait()
    with claim(out): pass                                                # the claim of the dead is taken over


def test_a_second_interrupt_does_not_wait():
    script = ("import time\nfrom t2v_turbo.checkpoints import stop_signals\nwith stop_signals():\n"
              "    print('in', flush=True)\n    while True: time.sleep(.1)")
    p = run(script, wait=False); p.stdout.readline()
    p.send_signal(signal.SIGINT); time.sleep(.5); assert p.poll() is None
    p.send_signal(signal.SIGINT); p.communicate(timeout=20); assert p.returncode not in (0, None)


@pytest.fixture
def tars(tmp_path):
    "Three shards of two rendered clips"
    clips, captions = World().batch(0, 6)
    write_shards(list(zip(clips, captions)), tmp_path / "tars", 2)
    return tmp_path / "tars"


def test_corrupt_shard(tmp_path, tars, capsys):
    "A shard that is cut off, or that is no tar, is refused before anything is written, with its name"
    whole = (tars / "000001.tar").read_bytes()
    for bad in (whole[:3000], b"no tar at all" * 100, whole[:1] + b"\0" * 600 + whole[601:]):
        (tars / "000001.tar").write_bytes(bad)
        said = refused(capsys, "distill", "--out", tmp_path / "o", "--data", tars, *SMALL)
        assert "1 of 3 shards cannot be read to the end: mend them" in said and "000001.tar" in said
        assert not (tmp_path / "o").exists()
    (tars / "000001.tar").write_bytes(whole)
    assert main([str(a) for a in ("distill", "--out", tmp_path / "o", "--data", tars, *SMALL)]) == 0


def test_missing_shard(tmp_path, tars, capsys):
    for data, why in ((f"{tars}/{{000000..000003}}.tar", "000003.tar cannot be read (No such file or directory)"),
                      (f"{tars}/x*.tar", "stands for no tar file"), (f"{tmp_path}/nowhere", "does not exist")):
        assert why in refused(capsys, "distill", "--out", tmp_path / "o", "--data", data, *SMALL)
        assert not (tmp_path / "o").exists()


ONE_OF_TWO = """
import os, sys, signal
from pathlib import Path
sys.path[:0] = [sys.argv.pop(1)]
what, shard = sys.argv.pop(1), sys.argv.pop(1)
if what == "bug": import cpu_fsdp
from t2v_turbo import train
from t2v_turbo.cli import main
from t2v_turbo.files import UserError
step, read = train.Trainer.one_step, train.Trainer.read
def one_step(self, feed):
    if self.step == 3 and self.accelerator.process_index == 1:
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "bug": raise UserError("a fault that shows on one process alone")
    return step(self, feed)
def gone(self, feed):
    if what == "gone" and self.step == 3 and self.accelerator.process_index == 1:
        feed.close(); Path(shard).rename(shard + ".away")
        return read(self, train.Prefetch(self.source, self.cfg.batch, self.rows, 3, 4))
    return read(self, feed)
train.Trainer.one_step, train.Trainer.read = one_step, gone
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("what, config, kept", [("kill", "ddp", 2), ("bug", "fsdp2", 2), ("gone", "ddp", 3)])
def test_a_fault_of_one_process_of_two(tmp_path, tars, what, config, kept):
    "Killed, or with a fault of its own, or it alone cannot read its shard: the other one ends too, and what was saved is whole"
    script, out = tmp_path / "one_of_two.py", tmp_path / "o"
    script.write_text(ONE_OF_TWO)
    # the shard that process 1 needs in step 3, and process 0 does not
    source = Shards(tars, 8, (64, 64), 8)
    own = lambda rank: {source.name(i).rpartition("/")[0] for _, i in source.picks(3, 2, slice(rank, rank + 1))}
    shard = (own(1) - own(0)).pop()
    args = ["--data", tars, "--out", out, *SMALL, "--save_every", "2"]
    begun = time.time()
    p = launching.start(config, *args, script=script, more=[str(Path(__file__).parent), what, shard], precision=None)
    _, err = launching.finish(p, 120)
    assert p.returncode != 0 and time.time() - begun < 100, err[-3000:]
    said = launching.said(err)
    if what == "gone":                             # both have said the same, and both have saved
        assert len(said) == 2 and len({*said}) == 1 and f"{shard} can no longer be read" in said[0], err[-3000:]
        Path(shard + ".away").rename(shard)
    else:
        if what == "bug": said.remove("t2v-turbo: a fault that shows on one process alone")
        gone = "t2v-turbo: another process of this run is gone: look at what it said, and run the same command again, which goes on from step 2"
        ended = not said and "closing signal SIGTERM" in err       # by the launcher, before it could report
        assert said == [gone] or ended, err[-3000:]
    store = Checkpoints(out)
    assert store.newest()[0] == kept and not (out / "run.lock").exists() and not [*out.glob("**/.tmp-*")]
    assert main([str(a) for a in ("distill", *args)]) == 0 and store.newest()[0] == 4


def test_another_cache(tmp_path, capsys):
    "A checkpoint knows its caches by what they hold: moved is fine, another one is refused"
    teacher, quiet = load_teacher("tiny"), dict(progress=False, batch=2, shard=2)
    for name, seed in (("lat", 0), ("lat2", 1)): build_cache("latents", teacher, World(seed=seed), tmp_path / name, 8, **quiet)
    captions = open_cache(tmp_path / "lat").captions
    for name, more in (("txt", []), ("txt2", ["a cat"])): build_cache("text", teacher, captions + more, tmp_path / name, **quiet)
    run = lambda lat, txt: ("distill", "--out", tmp_path / "o", *SMALL, "--data", tmp_path / lat, "--texts", tmp_path / txt)
    assert main([str(a) for a in (*run("lat", "txt"), "--steps", "2")]) == 0
    kept = {p.name: p.read_bytes() for p in (tmp_path / "o" / "checkpoints").iterdir()}
    for lat, txt, word in (("lat2", "txt", "data"), ("lat", "txt2", "text cache")):
        said = refused(capsys, *run(lat, txt))
        assert f"step-00000002.pt' was made with another {word} than" in said and f"give --{'data' if word == 'data' else 'texts'} " in said
    assert "made with another text cache than '' (" in refused(capsys, *run("lat", "txt")[:-2])      # without the cache of texts
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "o" / "checkpoints").iterdir()}
    (tmp_path / "txt").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main([str(a) for a in run("lat", "moved")]) == 0 and "resumed at step 2" in capsys.readouterr().out


# ---- run.lock: death gives it up, whatever its text says; a live run is refused

HOLD = "import sys, time\nfrom t2v_turbo.checkpoints import claim\nwith claim(sys.argv[1]): print('mine', flush=True); time.sleep(60)"


def holder(out):
    "A process that has claimed `out`"
    p = run(HOLD, out, wait=False)
    assert p.stdout.readline().strip() == "mine"
    return p


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(checkpoints, "BEAT", .1)


HOST = socket.gethostname()


@pytest.mark.parametrize("text", [f"{os.getpid()} {HOST}", f"1 {HOST}", "17 a-machine-that-was-lost", "17", "", "\0\xff"],
                         ids=["mine", "first", "elsewhere", "half", "empty", "bytes"])      # the same in all processes of pytest-xdist
def test_a_lock_that_nobody_holds(tmp_path, fast, text):
    "A restarted container has the same name and numbers; a lost machine never comes back to unlock"
    (tmp_path / "run.lock").write_bytes(text.encode("latin-1"))
    with claim(tmp_path):
        assert (tmp_path / "run.lock").read_text().splitlines()[0] == f"{os.getpid()} {socket.gethostname()}"
        with pytest.raises(UserError, match="in use by another run"), claim(tmp_path): pass
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("kernel", [True, False])
def test_one_stale_lock_has_one_heir(tmp_path, fast, monkeypatch, kernel):
    "Four processes find it at the same moment"
    (tmp_path / "run.lock").write_text(f"3999999 {socket.gethostname()}")
    if not kernel: monkeypatch.setattr(checkpoints, "fcntl", None); monkeypatch.setattr(checkpoints, "BEAT", .4)
    refuse = checkpoints._refuse_if_held
    def slow(*a): refuse(*a); time.sleep(.2)
    monkeypatch.setattr(checkpoints, "_refuse_if_held", slow)
    context = multiprocessing.get_context("fork"); told, start = context.Queue(), context.Event()
    def heir():
        start.wait()
        try:
            with claim(tmp_path): told.put(1); time.sleep(4)
        except UserError as e: assert "in use" in str(e) or "unknown" in str(e); told.put(0)
    ps = [context.Process(target=heir) for _ in range(4)]
    for p in ps: p.start()
    start.set()
    assert sorted(told.get(timeout=60) for _ in ps) == [0, 0, 0, 1]
    for p in ps: p.join()


def test_without_the_kernels_lock(tmp_path, fast, monkeypatch):
    "No fcntl, or a file system that has no such locks: the beats decide"
    def none(*a): raise OSError(errno.ENOLCK, "no locks")
    for fake in (None, SimpleNamespace(flock=none, LOCK_EX=2, LOCK_NB=4)):
        monkeypatch.setattr(checkpoints, "fcntl", fake)
        with claim(tmp_path):
            with pytest.raises(UserError, match=f"in use by another run .process {os.getpid()}."), claim(tmp_path): pass
        assert not (tmp_path / "run.lock").exists()
        (tmp_path / "run.lock").write_text(f"{os.getpid()} {socket.gethostname()}")          # left behind by a dead run
        with claim(tmp_path): pass


def test_a_live_run_on_another_machine(tmp_path, fast, monkeypatch):
    "Its kernel's lock may not be seen here, its beats are"
    (tmp_path / "run.lock").write_text("17 another-machine\nmark")
    with checkpoints._beats(tmp_path / "run.lock"):
        with pytest.raises(UserError, match="claimed by process 17 on another-machine: wait for it, or delete run.lock"), claim(tmp_path): pass
    assert (tmp_path / "run.lock").read_text() == "17 another-machine\nmark"
    with claim(tmp_path): pass


CHILDREN = """
import os, subprocess, sys, time
from t2v_turbo.checkpoints import claim
with claim(sys.argv[1]):
    child = subprocess.Popen(["sleep", "60"])
    if not (pid := os.fork()):
        sys.stdout.close(); time.sleep(60); os._exit(0)
    print(child.pid, pid, flush=True); time.sleep(60)
"""


def test_children_do_not_keep_the_lock(tmp_path):
    "A worker that was forked, and a program that was started, outlive a run that is killed"
    p = run(CHILDREN, tmp_path, wait=False)
    children = [int(c) for c in p.stdout.readline().split()]
    try:
        with pytest.raises(UserError, match=f"process {p.pid}"), claim(tmp_path): pass
        p.kill(); p.wait()
        with claim(tmp_path): pass
        for c in children: os.kill(c, 0)                                # they do live
    finally:
        for c in children: os.kill(c, signal.SIGKILL)


def test_a_forked_child_gives_up_nothing(tmp_path):
    with claim(tmp_path):
        if not (pid := os.fork()):
            try:
                with claim(tmp_path): os._exit(9)
            except UserError: os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        with pytest.raises(UserError, match="in use"), claim(tmp_path): pass


# ---- a folder that is replaced

REPLACED = """
import os, signal, sys
from pathlib import Path
from t2v_turbo import core
real, n = os.replace, [0]
def replace(a, b):
    n[0] += 1
    if n[0] == 2: os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
core.os.replace = replace
with core.atomic(sys.argv[1]) as tmp: tmp.mkdir(); (tmp / "new").touch()
"""


@pytest.mark.parametrize("how", ["atomic", "sweep", "again"])
def test_killed_between_two_renames(tmp_path, how):
    old = tmp_path / "model"; old.mkdir(); (old / "old").write_text("precious")
    assert subprocess.run([sys.executable, "-c", REPLACED, old], env=ENV, timeout=100).returncode == -signal.SIGKILL
    assert not old.exists()
    if how == "atomic":
        with pytest.raises(ZeroDivisionError), atomic(old): 1 / 0
    if how == "sweep": sweep(tmp_path)
    if how == "again":
        with atomic(old) as tmp: tmp.mkdir(); (tmp / "newer").touch()
    assert [p.name for p in old.iterdir()] == (["newer"] if how == "again" else ["old"])
    sweep(tmp_path, age=-float("inf"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", [{2}, {2, 3}])
def test_a_rename_that_fails(tmp_path, monkeypatch, fails):
    "The second rename, and even the one that puts the old folder back"
    old = tmp_path / "model"; old.mkdir(); (old / "old").write_text("precious")
    real, n = os.replace, [0]
    def replace(a, b):
        n[0] += 1
        if n[0] in fails: raise OSError(errno.ENOSPC, "No space left on device")
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"), atomic(old) as tmp: tmp.mkdir(); (tmp / "new").touch()
    monkeypatch.undo()
    sweep(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]


def test_what_is_promised_is_on_the_disk(tmp_path, monkeypatch):
    "File, folder and rename are flushed, in this order; the log is not"
    calls, fsync, real = [], os.fsync, os.replace
    name = lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(name(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"> {Path(b).name}"), real(a, b)))
    Checkpoints(tmp_path).save(3, dict(x=torch.ones(2)))
    assert calls == ["step-00000003.pt", "> step-00000003.pt", "checkpoints"]
    calls.clear()
    with atomic(tmp_path / "folder") as tmp: tmp.mkdir(); (tmp / "a").touch()
    assert calls == ["a", "folder", "> folder", tmp_path.name]
    calls.clear()
    with atomic(tmp_path / "log", sync=False) as tmp: tmp.touch()
    assert calls == ["> log"]


def test_a_pinned_checkpoint_stays(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 9):
        store.save(step, {})
        if step in (2, 4): Checkpoints(tmp_path).pin(step)              # by another object, as after a resume
    assert store.steps() == [4, 7, 8] and store.pinned == 4 and store.newest()[0] == 8
    (tmp_path / "checkpoints" / "pinned.json").write_text("{")
    store.save(9, {})
    assert store.steps() == [8, 9] and store.pinned is None


TOGETHER = """
import sys
from accelerate import PartialState
from t2v_turbo.checkpoints import claim_together
from t2v_turbo.files import UserError
state = PartialState(cpu=True)
try:
    with claim_together(sys.argv[1], state): sys.stdout.write("mine\\n")
except UserError as e: sys.stdout.write(f"{state.process_index} {e}\\n")         # one write a line: both share a pipe
"""


def test_a_refusal_reaches_every_process(tmp_path):
    "The main process claims for all; the others may not go on into a folder where a run lives"
    (tmp_path / "s.py").write_text(TOGETHER)
    go = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "s.py", tmp_path / "o"]
    again = lambda: subprocess.run(go, env=ENV, capture_output=True, text=True, timeout=300).stdout.splitlines()
    p = holder(tmp_path / "o")
    told = sorted(again())
    assert [l[0] for l in told] == ["0", "1"] and all(f"in use by another run (process {p.pid})" in l for l in told), told
    p.kill(); p.wait()
    assert again() == ["mine", "mine"]


LEFT_ALONE = """
import sys, torch
from t2v_turbo.checkpoints import claim_together
from t2v_turbo.files import UserError
from t2v_turbo.train import Config, Objective, Trainer
t = Trainer(Config(out=sys.argv[1], steps=9, batch=2, rank=2, save_every=2, lr=2e-4, track="", objective=Objective(beta_img=0., beta_vid=0.)))
try:
    with claim_together(sys.argv[1], t.accelerator), t.together():
        for row in t.fit():
            if row["step"] != 3: continue
            if t.accelerator.is_main_process: raise UserError("a fault of the main process alone")
            t.accelerator.reduce(torch.ones(1))                 # the others wait for it, as for a look at the student
except UserError as e: sys.exit(f"t2v-turbo: {e}")
"""


def test_a_loop_that_one_process_leaves(tmp_path):
    "It does not wait for the others, who wait for it: both end, and the last regular checkpoint stands"
    (tmp_path / "s.py").write_text(LEFT_ALONE)
    go = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "s.py", tmp_path / "o"]
    run = subprocess.run(go, env=ENV, capture_output=True, text=True, timeout=100)
    assert run.returncode != 0 and "t2v-turbo: a fault of the main process alone" in run.stderr, run.stderr[-2000:]
    assert Checkpoints(tmp_path / "o").steps() == [2] and not (tmp_path / "o" / "run.lock").exists()
