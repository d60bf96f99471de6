"""Settings for every test: no model hub, one calm thread a worker, no display; which tests the fast suite has.

`pytest` leaves out the tests that tests/durations.txt lists with more than `SLOW` seconds; `pytest --full` runs all, and so does
`pytest FILE`. tools/durations.py writes the list from the log of a full run.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")               # workers share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# The suite's core runs in every environment of tools/environments.py: these files without what takes long and depends on no version, a few tests of
# others, and what is marked where it stands (the notebooks of the method, the table of versions).
CORE = """caches cli clip_rewards colab_cell core data defaults distill folders golden hub identity oracle peft_beside_torchao pipeline plan published rate sampling sana student
teachers train_step tutorials video_rewards videos wan windows world""".split()
LONG = """test_a_cache_takes_the_text_encoder_away test_killed_and_gone_on_is_bit_identical test_meta_counts_what_a_cpu_counts test_one_step_and_four test_the_goal_at_full_size
test_who_is_compared_is_where_the_student_is test_within_a_fifth_of_what_a_process_takes""".split()
MORE = """test_a_fault_of_one_process_of_two""".split()


SLOW = 6.                                                   # seconds on two cores
DURATIONS = Path(__file__).parent / "durations.txt"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def durations(path=DURATIONS):
    "`{test: seconds}` of the last full run that was recorded; tests of less than a second are not listed"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: float(seconds) for seconds, name in (line.split(" ", 1) for line in lines)}


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too (tests/durations.txt); implied where files are named")


def pytest_configure(config):
    if hasattr(config, "workerinput"): config.option.full = config.workerinput["full"]
    elif config.args_source is not config.ArgsSource.TESTPATHS: config.option.full = True
    elif config.option.full: config.option.durations, config.option.durations_min = 0, 1.


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["full"] = node.config.option.full      # pytest 9.2 hands only what was given on the command line


def pytest_collection_modifyitems(config, items):
    taken, of_file = durations(), {}
    for item in items:
        mine, name = item.path.stem.removeprefix("test_") in CORE, getattr(item, "originalname", item.name)
        if mine and name not in LONG or name in MORE: item.add_marker(pytest.mark.core)
        if taken.get(item.nodeid, 0) <= SLOW: item.add_marker(pytest.mark.fast)
    slow = [] if config.option.full else [i for i in items if taken.get(i.nodeid, 0) > SLOW]
    items[:] = [i for i in items if i not in slow]
    config.hook.pytest_deselected(items=slow)
    for i in items: of_file[i.path] = of_file.get(i.path, 0) + taken.get(i.nodeid, .05)
    items.sort(key=lambda i: -of_file[i.path])              # a long file that comes last keeps one core idle


@pytest.fixture(scope="session")
def clip_vocabulary(tmp_path_factory):
    "CLIP's vocabulary: a data file in the wheel of open_clip_torch, which is fetched and never imported"
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "open_clip_torch"]
    subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels: pytest.skip("the wheel of open_clip_torch cannot be fetched")
    return wheels[0]


@pytest.fixture(scope="module")
def browser():
    "Chromium, which every test of a page opens pages in"
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    if not BROWSER: pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield b
        b.close()
