"The tutorial that gets a first real video: its own cells, from an empty cache, on a hub of the tests with the published names"
import json
import re
import subprocess
import sys
from pathlib import Path

import hub
import pytest

from t2v_turbo.fit import GB, host_bytes
from t2v_turbo.names import STUDENTS, TEACHERS
from t2v_turbo.plan import plan_sampling

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT/"nbs/tutorials/first_video.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
TEXT = "\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")

RUN = """
import sys
import torch
from t2v_turbo import core
core.pick_dtype = lambda device=None: torch.float16                  # as on a T4
from pathlib import Path
from notebooks import run_notebook
failed = run_notebook(Path(sys.argv[1]), [], Path(sys.argv[2]))
from IPython.core.interactiveshell import InteractiveShell
assert failed is None, failed
"""


def test_five_cells(): assert sum(c["cell_type"] == "code" for c in CELLS) == 5


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "All cells, in float16 as on a T4, with nothing in the cache; what they print and what they fetch"
    tmp = tmp_path_factory.mktemp("video")
    with hub.serve(hub.repositories(tmp/"repos")) as served:
        env = hub.environment(served, tmp/"home", PYTHONPATH=f"{ROOT}:{ROOT/'tests'}", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="0")
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, str(PAGE), str(ROOT)], env=env, text=True, capture_output=True, timeout=500)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout, served.fetched()


def test_it_runs_from_an_empty_cache(ran):
    out, fetched = ran
    assert {n for n in fetched if not n.endswith((".json", ".txt"))} == {
        "unet_lora.pt", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"}
    assert re.search(r"at most 4\.[0-9] GB of host memory while loading, 4\.9 GB on the GPU", out)
    assert re.search(r"student, 4 steps: \d+\.\d s\nteacher, 50 steps: \d+\.\d s", out) and out.count("IPython.core.display.HTML") == 2


def test_what_the_page_says_is_what_is_predicted():
    "Memory of a free Colab machine, sizes and operations"
    plan, student = plan_sampling("modelscope"), STUDENTS["t2v-turbo-ms"]
    assert host_bytes(plan) < 12.7e9/2 and 2*sum(plan.weights.values()) + plan.peak < 14.56*GB, "both models, together"
    sizes = dict(zip(("denoiser", "text", "vae"), map(float, re.search(r"UNet ([\d.]+), text encoder ([\d.]+), VAE ([\d.]+) GB", TEXT).groups())))
    assert all(abs(plan.weights[k]/1e9 - v) < .01 for k, v in sizes.items()) and abs(sum(sizes.values())*2 - TEACHERS["modelscope"].gb) < .05
    assert f"{student.gb:.2f}".lstrip("0") + " GB" in TEXT and student.at.rpartition("/")[0] in TEXT and TEACHERS["modelscope"].licence in TEXT
    calls, decode = plan.phases["denoiser"]["flops"]/1e12, plan.phases["decode"]["flops"]/1e12
    assert f"{4*calls + decode:.0f} TFLOP" in TEXT and f"{100*calls + decode:.0f} TFLOP" in TEXT
    assert "not tried on a GPU" in TEXT and "published weights" in TEXT
