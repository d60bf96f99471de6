"The files of configs/: read by accelerate, started for real on CPU processes, and all of them train the same student"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launching import ENV, ROOT, SMALL, coded, finish, launch, put, said
from safetensors.torch import load_file
from test_streams import blotted, real  # noqa: F401 (a fixture)

from t2v_turbo.cli import main
from t2v_turbo.core import make_gen
from t2v_turbo.data.shards import Shards
from t2v_turbo.data.videos import read_clip
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.train import Config, Objective, Trainer

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
RUN = [*SMALL, "--ema", ".9", "--accumulate", "2", "--seed", "2"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    "No key that accelerate does not know, and the values arrive where its launcher looks for them"
    path = ROOT / "configs" / f"{name}.yaml"
    cfg, raw = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
    assert isinstance(cfg, ClusterConfig) and cfg.num_processes == 8 and cfg.mixed_precision == "bf16"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    kind = dict(ddp="multi_gpu", fsdp2="use_fsdp")[name]
    assert [k for k in ("multi_gpu", "use_fsdp") if getattr(args, k)] == [kind]
    known = vars(launch_command_parser().parse_args(["x.py"]))                    # also the keys of the part below
    for k, v in raw.get("fsdp_config", {}).items(): assert k in known and getattr(args, k) == v, k


def test_other_engines_are_named(tmp_path, monkeypatch, capsys):
    "An engine that the trainer does not have is refused by name; FSDP without an accelerator is plain, and that is said"
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
        assert main(["distill", "--out", str(tmp_path / "o")]) == 2 and not (tmp_path / "o").exists()
        assert f"{engine} is not supported: give configs/ddp.yaml or configs/fsdp2.yaml" in capsys.readouterr().err
        monkeypatch.delenv(f"ACCELERATE_USE_{engine}")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(UserWarning, match="nothing is sharded"):
        assert not Trainer(Config(out=str(tmp_path / "o"), rank=2, track="", objective=Objective(beta_img=0., beta_vid=0.))).sharded


@pytest.fixture(scope="module")
def tars(tmp_path_factory, real):  # noqa: F811
    "Three shards of 12 real clips, and among them a text that calls itself a video, a torn video and one without caption"
    folder, keys = tmp_path_factory.mktemp("data") / "tars", sorted(real)[:3]
    mp4 = [coded(read_clip(real[keys[i % len(keys)]], 12, (48, 64), 8, make_gen(i))) for i in range(12)]
    pair = lambda name, data: [(f"{name}.mp4", data), (f"{name}.txt", f"a clip called {name}".encode())]
    for s in range(3):
        members = [m for i in range(4 * s, 4 * s + 4) for m in pair(f"{i:03d}", mp4[i])]
        if s == 1: members[2:2] = [*pair("text", b"no video at all"), *pair("torn", blotted(mp4[0])), ("mute.mp4", mp4[1])]
        put(folder / f"{s:03d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, tars):
    "The run of one process, in this process"
    out = tmp_path_factory.mktemp("one") / "o"
    with pytest.warns(UserWarning, match="left out|torn"): assert run_here(out, tars) == 0
    return out


def run_here(out, data, run=RUN):
    "`t2v-turbo distill` in one process"
    return main(["distill", "--data", str(data), "--out", str(out), *run])


def weights(out): return load_file(Path(out) / "student" / "adapter_model.safetensors")


def moments(out):
    state = torch.load(Path(out) / "checkpoints" / "step-00000004.pt", weights_only=True)
    return {(n, k): v for n, s in state["optimizer"]["state"].items() for k, v in s.items() if k != "step"}, state


def same_bits(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def check_agree(out, one, student=None):
    """Losses and gradients to 1e-5, and the student as far as AdamW lets it.

    AdamW divides a gradient by its own size. Where it is zero but for rounding (a shift of all keys does not change attention) rounding
    alone decides which way the number goes, by up to lr a step: a few of 84 480 numbers differ by more than 1e-5, see the moments for the
    gradients themselves. `student` is a run on as many processes: then all of its numbers agree.
    """
    rows = [[json.loads(l) for l in (d / "log.jsonl").read_text().splitlines()] for d in (out, one)]
    assert [r["step"] for r in rows[0]] == [1, 2, 3, 4]
    for a, b in zip(*rows):
        for k in ("loss", "cd", "j_img", "j_vid"): assert abs(a[k] - b[k]) < 1e-5 * max(1, abs(b[k])), (k, a, b)
    (a, sa), (b, sb) = moments(out), moments(one)
    assert a.keys() == b.keys()
    for part in ("exp_avg", "exp_avg_sq"):
        x, y = (torch.cat([v.flatten() for (_, k), v in m.items() if k == part]) for m in (a, b))
        assert (x - y).norm() < 1e-4 * y.norm() and (x - y).abs().max() < 1e-5, part
    a, b = weights(out), weights(one)
    assert a.keys() == b.keys()
    off = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert (off > 1e-5).sum() < 20 and off.max() < 1e-3 and off.norm() < 1e-4 * torch.cat([v.flatten() for v in b.values()]).norm()
    for k, v in weights(student).items() if student else (): torch.testing.assert_close(a[k], v, rtol=0, atol=1e-5)
    return sa, sb


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, tars):
    "Two processes under configs/ddp.yaml; folder, stdout"
    out = tmp_path_factory.mktemp("ddp") / "o"
    return out, launch("ddp", "--data", tars, "--out", out, *RUN)[0]


def test_ddp_trains_the_student_of_one_process(ddp, one):
    check_agree(ddp[0], one)


def test_corrupt_members_are_reported_by_the_process_that_did_not_read_them(ddp, one, tars):
    "What is left out is gathered from all processes; the main one says it at the end and keeps it"
    gone = json.loads((ddp[0] / "left_out.json").read_text())
    assert [Path(g["name"]).name for g in gone] == ["mute", "text", "torn.mp4"]
    last, = (x for x in ddp[1].splitlines() if x.startswith(f"3 clips were left out, as {ddp[0]}/left_out.json lists: "))
    assert all(g["why"] in last for g in gone)
    source = Shards(tars, 8, (64, 64), 8, seed=2)
    torn = [i for i in range(len(source)) if "torn" in source.name(i)]
    who = [k for step in range(4) for k in range(2) if {i for _, i in source.picks(step, 4, slice(2*k, 2*k + 2))} & set(torn)]
    assert who == [1], "the main process reads it itself: give the data another order"
    assert (one / "left_out.json").read_bytes() == (ddp[0] / "left_out.json").read_bytes()


FAKE = dict(scontrol='[ "$1" = requeue ] && echo "$2" >> "$LOG"; echo 127.0.0.1',
            srun='pids=; trap \'kill -TERM $pids\' TERM\nwhile [[ $1 == --* ]]; do shift; done\n'
                 'for i in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$i "$@" & pids="$pids $!"; done\n'
                 'code=0; for p in $pids; do while kill -0 $p 2>/dev/null; do wait $p; done; wait $p || code=1; done; exit $code')


def slurm(tmp_path, *args):
    "configs/slurm_multi_node.sh as job 7 on two machines, which are both this one"
    folder = tmp_path / "bin"; folder.mkdir(exist_ok=True)
    for name, text in FAKE.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n"); (folder / name).chmod(0o755)
    env = ENV | dict(PATH=f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", SLURM_NNODES="2", SLURM_JOB_NODELIST="a[1-2]",
                     SLURM_JOB_ID="7", PER_NODE="1", LAUNCH="--mixed_precision no", LOG=str(tmp_path / "requeued"),
                     PORT=str(20000 + os.getpid() % 20000))
    return subprocess.Popen(["bash", "configs/slurm_multi_node.sh", *map(str, args)], cwd=ROOT, env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_slurm_script(tmp_path, ddp, tars):
    "Two machines of one process: ended by SIGTERM it saves and is put into the queue again, and then ends with the bits of `ddp.yaml`"
    assert subprocess.run(["bash", "-n", ROOT / "configs" / "slurm_multi_node.sh"]).returncode == 0
    args, log = ["--data", tars, "--out", tmp_path / "o", *RUN], tmp_path / "o" / "log.jsonl"
    p = slurm(tmp_path, *args)
    for _ in range(1200):
        if log.is_file() and log.read_text() or p.poll() is not None: break
        time.sleep(.05)
    p.send_signal(signal.SIGTERM)
    out, err = finish(p, 120)
    assert p.returncode != 0 and (tmp_path / "requeued").read_text() == "7\n", err[-3000:]
    assert "stopped by SIGTERM at step" in err and not (tmp_path / "o" / "run.lock").exists()
    p = slurm(tmp_path, *args)
    out, err = finish(p)
    assert p.returncode == 0 and "resumed at step" in out and (tmp_path / "requeued").read_text() == "7\n", err[-3000:]
    assert same_bits(tmp_path / "o", ddp[0])
    assert (tmp_path / "o" / "left_out.json").read_bytes() == (ddp[0] / "left_out.json").read_bytes()


def test_fsdp2_trains_the_same_student_and_resumes(tmp_path, ddp, one, tars):
    "The denoiser is cut up over two processes; a look needs both; its checkpoint is resumed by two processes and by one"
    (tmp_path / "prompts.txt").write_text("a red fish moving left in the sea\na blue car moving up in the desert\n")
    args = ["--data", tars, "--out", tmp_path / "o", *RUN, "--prompts", tmp_path / "prompts.txt", "--eval_every", "2"]
    assert "the denoiser sharded over them" in launch("fsdp2", *args)[0]
    mine, his = check_agree(tmp_path / "o", one, ddp[0])
    for a, b in zip(mine["ema"]["shadow_params"], his["ema"]["shadow_params"]): assert a.shape == b.shape and (a - b).norm() < 1e-4
    assert [json.loads(l)["step"] for l in (tmp_path / "o" / "looks.jsonl").read_text().splitlines()] == [0, 2, 4]
    for d in ("two", "one"):
        shutil.copytree(tmp_path / "o", tmp_path / d)
        (tmp_path / d / "checkpoints" / "step-00000004.pt").unlink(); shutil.rmtree(tmp_path / d / "student")
    args[3] = tmp_path / "two"
    assert "resumed at step 2 of 4" in launch("fsdp2", *args)[0]
    assert same_bits(tmp_path / "two", tmp_path / "o")
    assert run_here(tmp_path / "one", tars) == 0
    check_agree(tmp_path / "one", tmp_path / "o")


NAN = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import cpu_fsdp, torch
from torch import distributed as dist
from t2v_turbo.saved import whole
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.train import Config, Objective, Trainer
calls = 0
def reward(frames, prompts):
    "NaN in step 2, for one clip of process 1"
    global calls; calls += 1
    bad = float("nan") if (calls, os.environ["RANK"]) == (2, "1") else 0.
    return frames.mean((1, 2, 3, 4)) + frames.new_tensor([bad, *[0.] * (len(frames) - 1)])
t = Trainer(Config(out=sys.argv[1], steps=4, batch=4, rank=2, save_every=100, ema=.9, max_skipped=2, track="",
                   objective=Objective(beta_img=0.)), video_reward=reward)
assert t.sharded and hasattr(t.params[1], "placements")
seen = []
for row in t.fit():
    local = [p.to_local().clone() for p in (*t.params, *t.engine.ema.shadow_params)]
    moved = bool(seen) and not all(map(torch.equal, seen[-1], local))
    seen.append(local)
    steps = {int(s["step"]) for s in t.engine.opt.optimizer.state.values()}
    told = [None] * 2
    dist.all_gather_object(told, (moved, row["skipped"], t.in_a_row, sorted(steps), row["loss"] == row["loss"]))
    if t.accelerator.is_main_process: print("step", row["step"], *told, sep="|", flush=True)
params = [whole(p) for p in t.params]
if t.accelerator.is_main_process: print("finite", all(bool(p.isfinite().all()) for p in params))
"""


def test_a_nan_step_under_fsdp2(tmp_path):
    "NaN on one process of two, in step 2: skipped and counted by both, no weight moves, neither in the EMA nor in AdamW; step 3 goes on"
    script = tmp_path / "nan.py"; script.write_text(NAN)
    out, _ = launch("fsdp2", n=2, script=script, more=(ROOT / "tests", tmp_path / "o"))
    lines = [l.split("|")[1:] for l in out.splitlines() if l.startswith("step|")]
    # step, then moved, skipped, skipped in a row, AdamW's count and whether the loss is a number, on process 0 and 1
    want = [(False, 0, 0, [1], True), (False, 1, 1, [1], False), (True, 1, 0, [2], True), (True, 1, 0, [3], True)]
    assert lines == [[str(i), str(w), str(w)] for i, w in enumerate(want, 1)], out
    assert "finite True" in out
    rows = [json.loads(l) for l in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] is None for r in rows] == [False, True, False, False] and rows[-1]["skipped"] == 1


def test_fsdp2_refuses_8bit_states(tmp_path):
    "bitsandbytes has no rule for tensors that are cut up: said before anything is made"
    _, err = launch("fsdp2", "--out", tmp_path / "o", "--optimizer", "adamw8bit", *SMALL, code=2)
    assert {l.split("\n")[0] for l in said(err)} == {"t2v-turbo: adamw8bit cannot step what FSDP has sharded: give --optimizer adamw"}
    assert not (tmp_path / "o").exists()


def test_float16_is_scaled_under_fsdp2_as_under_ddp(tmp_path):
    "Hooks of sharded weights do not fire: their gradients are divided after the step, so norms and weights are those of DDP"
    rows = []
    for name in ("ddp", "fsdp2"):                                  # of a folder: no table, whose 50 steps take minutes in float16 on a CPU
        launch(name, "--out", tmp_path / name, *SMALL, "--teacher", WEIGHTS / "tiny", "--steps", "2", "--accumulate", "2", "--dtype", "float16",
               "--beta_vid", "0", precision="fp16", seconds=1200)
        rows.append([json.loads(l) for l in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    for a, b in zip(*rows):
        assert a["scale"] == b["scale"] > 1 and a["skipped"] == b["skipped"] == 0
        assert abs(a["grad_norm"] - b["grad_norm"]) < .02 * a["grad_norm"] and abs(a["loss"] - b["loss"]) < .01 * abs(a["loss"])
