"Where the numbers recorded from the published implementations lie, and how they are read"
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("T2V_TURBO_GOLDEN",
                             Path(__file__).resolve().parents[2]/"shared/golden"))
SUFFIXES = ".safetensors", ".pt"
FILES = sorted(p for p in FOLDER.iterdir() if p.suffix in SUFFIXES) if FOLDER.is_dir() else []


def read(path, prefix):
    "All tensors, those under `prefix` without it, and the metadata with its JSON read"
    with safe_open(path, "pt") as f: meta = f.metadata() or {}
    d = load_file(path)
    state = {k.removeprefix(prefix): v for k, v in d.items() if k.startswith(prefix)}
    return d, state, {k: json.loads(v) if v[:1] in "{[" else v for k, v in meta.items()}

def near(got, want, atol=1e-5):
    "Largest absolute difference at most `atol`, compared in float64"
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


def close(got, want):
    "Relative error below 1e-4"
    assert (got - want).norm()/want.norm() < 1e-4
