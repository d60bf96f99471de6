"Settings for every test: no model hub, calm threads, no display."
import os
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# The suite's core, beside what is marked where it stands (the notebooks of the method): runs in every environment of tools/environments.py.
CORE = """caches cli clip_rewards colab_cell data faults folders golden hub memory oracle pipeline plan precision published rewards
sampling teachers train train_step tutorials video_rewards videos wan world""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in CORE: item.add_marker(pytest.mark.core)


@pytest.fixture(scope="session")
def clip_vocabulary(tmp_path_factory):
    "CLIP's vocabulary: a data file in the wheel of open_clip_torch, which is fetched and never imported"
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "open_clip_torch"]
    subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels: pytest.skip("the wheel of open_clip_torch cannot be fetched")
    return wheels[0]
