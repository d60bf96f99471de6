"Training that is killed at 20 random moments ends with the weights of an undisturbed run, bit for bit"
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves


def leaves(tree):
    "Everything in it, bit for bit"
    return [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in tree_leaves(tree)]


@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills(tmp_path, processes):
    run = subprocess.run([sys.executable, str(Path(__file__).with_name("kill_and_resume.py")), str(tmp_path), str(processes),
                          "20", "7"], capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["kills"] == 20 and told["steps"] == sorted(told["steps"]), told     # what was saved is never lost
    assert len(set(told["steps"])) > 5, f"the kills did not spread: {told}"
    print(told)
    a, b = (load_file(tmp_path / d / "student" / "adapter_model.safetensors") for d in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(x) for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("whole", "cut")]
    assert [r["step"] for r in logs[1]] == list(range(1, 161))
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    states = [torch.load(tmp_path / d / "checkpoints" / "step-00000160.pt", weights_only=True) for d in ("whole", "cut")]
    for part in ("params", "ema"): assert leaves(states[0][part]) == leaves(states[1][part]), part
    a, b = (s["optimizer"]["state"] for s in states)
    assert a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])
    assert not list(tmp_path.glob("cut/**/.tmp-*")) and not (tmp_path / "cut" / "run.lock").exists()
