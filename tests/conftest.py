"Settings for every test: no model hub, calm threads, no display."
import os
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def clip_vocabulary(tmp_path_factory):
    "CLIP's vocabulary: a data file in the wheel of open_clip_torch, which is fetched and never imported"
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "open_clip_torch"]
    subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels: pytest.skip("the wheel of open_clip_torch cannot be fetched")
    return wheels[0]
