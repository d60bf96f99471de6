"Runs as a user starts them: `accelerate launch` with a file of configs/, on two gloo processes"
import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import av

from t2v_turbo.core import _frames_u8

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
MOVED = """
import json, os, sys
if os.environ.get("ACCELERATE_USE_FSDP"): sys.path.insert(0, sys.argv[3]); import cpu_fsdp
import torch
from t2v_turbo import train
from t2v_turbo.distill import Objective
from t2v_turbo.saved import whole
from t2v_turbo.train import Config, Trainer
made = train.make_student
def moved(*args):                          # away from B = 0, before anything is sharded
    student, gen = made(*args), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.trainable().values(): p.add_(.02 * torch.randn(p.shape, generator=gen))
    return student
train.make_student = moved
where, more = sys.argv[1], json.loads(sys.argv[2])
"""  # how a script starts that trains a student on one process or more: `where` and `more` are its arguments
SMALL = ["--steps", "4", "--batch", "4", "--rank", "2", "--save_every", "2", "--repeats", "1", "--track", ""]


def start(config, *args, n=2, script=None, more=(), precision="no"):
    "A started run; `script` with the arguments `more` stands for `-m t2v_turbo.cli`; `precision=None` is that of the file"
    own = dict(fsdp2="cpu_fsdp.py").get(config)
    script = [str(script)] if script else [str(ROOT / "tests" / own)] if own else ["-m", "t2v_turbo.cli"]
    cmd = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(ROOT / "configs" / f"{config}.yaml"),
           "--num_processes", str(n), "--main_process_port", "0", *(["--mixed_precision", precision] if precision else []), *script, *more]
    return subprocess.Popen([*cmd, "distill", *map(str, args)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def finish(p, seconds=300):
    "stdout and stderr of a run; one that hangs is ended with all of its processes"
    try: return p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL); p.communicate()
        raise


def launch(*args, code=0, seconds=300, **kw):
    "A run that has ended; stdout, stderr"
    p = start(*args, **kw)
    out, err = finish(p, seconds)
    assert (p.returncode == 0) == (code == 0), err[-3000:]
    return out, err


def said(err): return [l[l.index("t2v-turbo: "):] for l in err.splitlines() if "t2v-turbo: " in l]


def coded(clip):
    "A clip (c t h w) as an MP4 with the same bytes every time: x264's lookahead, which `write_video` has, gives others now and then"
    out, x = io.BytesIO(), _frames_u8(clip)
    with av.open(out, "w", format="mp4") as f:
        s = f.add_stream("libx264", rate=8, options=dict(crf="18", preset="ultrafast"))
        s.height, s.width, s.pix_fmt = *x.shape[1:3], "yuv420p"
        for im in x: f.mux(s.encode(av.VideoFrame.from_ndarray(im, format="rgb24")))
        f.mux(s.encode())
    return out.getvalue()


def put(path, members):
    "A tar of (name, bytes)"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name); info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
