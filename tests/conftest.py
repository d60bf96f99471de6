"Settings for every test: no model hub, calm threads, no display."
import os
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# The suite's core runs in every environment of tools/environments.py: these files without what takes long and depends on no version, a few tests of
# others, and what is marked where it stands (the notebooks of the method, the table of versions).
CORE = """caches cli clip_rewards colab_cell core data defaults folders golden hub identity oracle peft_beside_torchao pipeline plan published rate sampling student
teachers train_step tutorials video_rewards videos wan windows world""".split()
LONG = """test_a_cache_takes_the_text_encoder_away test_killed_and_gone_on_is_bit_identical test_meta_counts_what_a_cpu_counts test_one_step_and_four test_the_goal_at_full_size
test_who_is_compared_is_where_the_student_is test_within_a_fifth_of_what_a_process_takes""".split()
MORE = """test_a_fault_of_one_process_of_two""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        mine, name = item.path.stem.removeprefix("test_") in CORE, getattr(item, "originalname", item.name)
        if mine and name not in LONG or name in MORE: item.add_marker(pytest.mark.core)


@pytest.fixture(scope="session")
def clip_vocabulary(tmp_path_factory):
    "CLIP's vocabulary: a data file in the wheel of open_clip_torch, which is fetched and never imported"
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "open_clip_torch"]
    subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels: pytest.skip("the wheel of open_clip_torch cannot be fetched")
    return wheels[0]
