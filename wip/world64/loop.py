"""A training loop that can be killed at any time and goes on with the same bits"""
import json
import os
import time
from pathlib import Path

import torch
from torch import nn


def save(state: dict, path: Path) -> None:
    "Write beside, then rename: a reader never sees half a file"
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def average(ema: dict, net: nn.Module, decay: float) -> None:
    "Move the averaged weights towards those of `net`"
    with torch.no_grad():
        for name, p in net.named_parameters():
            ema[name].lerp_(p, 1 - decay)


def clock(hours: float):
    "A function that tells whether `hours` are over"
    end = time.monotonic() + 3600 * hours
    return lambda: time.monotonic() > end


def train(net: nn.Module,
          loss_of,             # step -> scalar loss; all randomness follows from the step
          factor,              # step -> learning-rate factor
          folder: Path,        # of checkpoint `last.pt` and log `loss.jsonl`
          steps: int,          # in all, over all runs
          hours: float,        # of this run
          opt,                 # an optimiser; its groups' rates are multiplied by `factor`
          decay: float = .999,   # of the average of weights; less in the first steps
          save_every: float = 300,  # seconds
          per_step: int = 1,     # clips in a step, for the log
          ) -> dict:             # averaged weights by name
    "Minimise; go on from `last.pt` where there is one"
    folder.mkdir(parents=True, exist_ok=True)
    rates = [group["lr"] for group in opt.param_groups]  # before a checkpoint's take their place
    ema = {n: p.detach().clone() for n, p in net.named_parameters()}
    first = 0
    if (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt")
        net.load_state_dict(state["net"]), opt.load_state_dict(state["opt"])
        ema, first = state["ema"], state["step"]
    keep = lambda step: save({"net": net.state_dict(), "opt": opt.state_dict(), "ema": ema,
                              "step": step}, folder / "last.pt")
    over, saved, losses, cpu = clock(hours), time.monotonic(), [], time.process_time()
    for step in range(first, steps):
        for group, rate in zip(opt.param_groups, rates):
            group["lr"] = rate * factor(step)
        loss = loss_of(step)
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        average(ema, net, min(decay, (step + 1) / (step + 10)))
        losses.append((loss.item(), norm.item()))
        if (step + 1) % 50 == 0:
            mean = torch.tensor(losses).mean(0).tolist()
            row = {"step": step + 1, "seen": (step + 1) * per_step, "loss": round(mean[0], 5),
                   "norm": round(mean[1], 4), "cpu": round(time.process_time() - cpu, 1)}
            with open(folder / "loss.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            losses = []
        if time.monotonic() - saved > save_every:
            keep(step + 1)
            saved = time.monotonic()
        if over():
            break
    if first < steps:
        keep(step + 1)
    return ema
