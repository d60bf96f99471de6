"""Kill a training 20 times at random moments and resume it each time: run by test_kills.py, in a process of its own.

    python tests/kill_and_resume.py OUT PROCESSES KILLS SEED

Every start is a fork of this process, so that the imports are paid for once; two starts are two gloo processes. All are
killed together with SIGKILL, as by a machine that goes down. Prints one JSON line.
"""
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", ACCELERATE_USE_CPU="true")
import torch  # noqa: E402

torch.set_num_threads(1)
from t2v_turbo.checkpoints import Checkpoints, claim  # noqa: E402
from t2v_turbo.train import Config, Objective, Trainer  # noqa: E402

# no rewards: they have no state of their own; a checkpoint every step, so that many kills fall into one
SETTINGS = dict(steps=160, batch=2, rank=2, save_every=1, keep=2, lr=2e-4, track="", ema=.9,
                objective=Objective(beta_img=0., beta_vid=0.))


def train(out, rank, n, port):
    "One process of a run; never returns"
    torch.set_num_threads(1)                                  # makes a child's pool anew, before several threads look for it
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if n == 1:
        for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"): del os.environ[k]
    trainer = Trainer(Config(out=str(out), **SETTINGS))
    assert trainer.accelerator.num_processes == n
    if rank: trainer.resume(); [None for _ in trainer.fit()]
    else:
        with claim(out):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.resume()
            for _ in trainer.fit(): pass
    os._exit(0)


def start(out, n):
    "The processes of a run, as children"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    pids = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            try: train(out, rank, n, port)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        pids.append(pid)
    return pids


def wait(pids): return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]


def main(out, n, kills, seed):
    dice, out = random.Random(seed), Path(out)
    begun = time.time()
    assert wait(start(out / "whole", n)) == [0] * n
    whole = time.time() - begun
    in_save, steps = 0, []
    for _ in range(kills):
        pids = start(out / "cut", n)
        time.sleep(dice.uniform(0, .07) * whole)
        for p in pids: os.kill(p, signal.SIGKILL)
        codes = wait(pids)
        assert -9 in codes, f"the run was over before the kill: {codes}"
        in_save += bool([*(out / "cut").glob("**/.tmp-*")])
        steps.append(max(Checkpoints(out / "cut").steps(), default=0))    # the log may be a step ahead, and goes back to it
    assert wait(start(out / "cut", n)) == [0] * n
    print(json.dumps(dict(kills=kills, in_save=in_save, steps=steps, seconds=whole)))


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
