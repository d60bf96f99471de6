"Published students by name, fetched from a hub of the tests with an empty cache: converted once, by commit, and sampled"
import json
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch

from t2v_turbo.files import UserError
from t2v_turbo.names import STUDENTS, TEACHERS, published_student, student_folder
from t2v_turbo.plan import TEACHERS as PLANNED
from t2v_turbo.teachers.folders import DEFAULTS, SHIPPED

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def repos(tmp_path_factory): return hub.students(hub.repositories(tmp_path_factory.mktemp("repos")/"repos"))


@pytest.fixture
def served(repos):
    with hub.serve(repos) as server: yield server


def python(served, home, code, **more):
    "Start a program with the hub of the tests"
    env = hub.environment(served, home, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="0") | more
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return out, err


LOAD = """
import json, torch
from t2v_turbo.core import make_gen
from t2v_turbo.pipeline import T2VTurboPipeline
for name in {names!r}:
    pipe = T2VTurboPipeline.from_pretrained(name, dtype=torch.{dtype})
    pipe.set_progress_bar_config(disable=True)
    c = pipe.config
    clip = pipe("a panda dances", generator=make_gen(0), height=32, width=32, num_frames=2, output_type="pt").frames
    w = [pipe("a panda", num_inference_steps=1, guidance_scale=g, generator=make_gen(0), height=32, width=32, num_frames=2, output_type="pt").frames for g in (1., 9.)]
    print(json.dumps(dict(name=name, how=[c.steps, c.origin_steps, c.guidance_scale, c.fps], sum=clip.double().sum().item(),
                          w=(w[0] - w[1]).abs().max().item() > 0, id=pipe.fingerprint(), dtype=str(pipe.denoiser.dtype))))
"""


def rows(out): return {r["name"]: r for r in map(json.loads, out.splitlines())}


def test_every_published_student(served, tmp_path):
    "From an empty cache, in one process; then again without a conversion, and offline; ids of the hub are the same students"
    out, err = ended(python(served, tmp_path, LOAD.format(names=[*STUDENTS], dtype="float32")))
    first = rows(out)
    assert {n: r["how"] for n, r in first.items()} == {
        "t2v-turbo-ms": [4, 50, 7.5, 8], "t2v-turbo-vc2": [4, 50, 7.5, 16], "t2v-turbo-vc2-merged": [4, 50, 7.5, 16],
        "t2v-turbo-v2": [16, 200, 7.5, 8], "t2v-turbo-v2-no-mg": [16, 200, 7.5, 8]}
    assert all(r["w"] for r in first.values()), "guidance has no effect"
    assert first["t2v-turbo-vc2-merged"]["id"] != first["t2v-turbo-v2"]["id"] != first["t2v-turbo-v2-no-mg"]["id"]
    assert len([line for line in err.splitlines() if line.startswith("converting")]) == len(STUDENTS) + 1     # and VideoCrafter2, once
    kept = tmp_path/"t2v_turbo"
    assert not list(kept.rglob(".tmp-*"))
    sent = len(served.fetched())
    ids = {STUDENTS[n].at.rpartition("/")[0]: n for n in ("t2v-turbo-ms", "t2v-turbo-vc2")}
    out, err = ended(python(served, tmp_path, LOAD.format(names=[*ids], dtype="float32")))
    assert "converting" not in err and len(served.fetched()) == sent
    assert {ids[n]: r["id"] for n, r in rows(out).items()} == {n: first[n]["id"] for n in ids.values()}
    served.status = 503
    out, err = ended(python(served, tmp_path, LOAD.format(names=["t2v-turbo-ms"], dtype="float32"), HF_HUB_OFFLINE="1"))
    assert rows(out)["t2v-turbo-ms"] == first["t2v-turbo-ms"] and "converting" not in err


def test_half_of_a_download(served, tmp_path):
    "In float16 only the float16 files of the base model come, and the student is that of float32 up to rounding"
    out, _ = ended(python(served, tmp_path, LOAD.format(names=["t2v-turbo-ms"], dtype="float16")))
    assert rows(out)["t2v-turbo-ms"]["dtype"] == "torch.float16"
    weights = [n for n in served.fetched() if n.endswith(".safetensors")]
    assert weights and all(".fp16." in n for n in weights)
    full, err = ended(python(served, tmp_path, LOAD.format(names=["t2v-turbo-ms"], dtype="float32")))
    assert err.count("converting") == 1
    a, b = (rows(o)["t2v-turbo-ms"]["sum"] for o in (out, full))
    assert abs(a/b - 1) < .02


def test_a_new_commit_is_converted_anew(repos, tmp_path):
    copy = tmp_path/"repos"
    shutil.copytree(repos, copy)
    code = 'from t2v_turbo.names import student_folder\nprint(student_folder("t2v-turbo-ms"))'
    with hub.serve(copy) as served:
        one, _ = ended(python(served, tmp_path/"home", code))
        torch.save(hub.lora_list(copy/TEACHERS["modelscope"].at, "ms", 5), copy/STUDENTS["t2v-turbo-ms"].at)
        two, err = ended(python(served, tmp_path/"home", code))
        assert one != two and "converting t2v-turbo-ms, once" in err and all(Path(f.strip()).is_dir() for f in (one, two))
        pinned = json.loads((Path(two.strip())/"student.json").read_text())["teacher"]
        assert pinned.startswith(TEACHERS["modelscope"].at + "@") and len(pinned.partition("@")[2]) == 40


def test_two_processes_at_once(served, tmp_path):
    "Only one converts, and both load the same weights"
    both = [python(served, tmp_path, LOAD.format(names=["t2v-turbo-vc2"], dtype="float32")) for _ in range(2)]
    (a, one), (b, two) = map(ended, both)
    assert rows(a)["t2v-turbo-vc2"] == rows(b)["t2v-turbo-vc2"]
    assert (one + two).count("converting VideoCrafter2") == 1 and (one + two).count("converting t2v-turbo-vc2") == 1


def test_sample_by_name(served, tmp_path):
    "The command of the README; a misspelt name, and a file in the place of the folder, are refused before anything is fetched"
    code = "import sys\nfrom t2v_turbo.cli import main\nfor words in {}: print(main(['sample', *words.split()]))"
    good = "--student t2v-turbo-ms --prompt panda --out videos --format gif"
    script = f"import os\nos.chdir({str(tmp_path)!r})\nopen('taken', 'w').close()\n"
    out, err = ended(python(served, tmp_path/"home", script + code.format([good.replace("-ms", "-mss"), good.replace("videos", "taken")])))
    assert out.split() == ["2", "2"] and not served.fetched(sent=False)
    lines = [line for line in err.splitlines() if line.startswith("t2v-turbo: ")]
    assert lines[0].startswith("t2v-turbo: there is no student 't2v-turbo-mss' (did you mean 't2v-turbo-ms'?): give ") and "is a file: give a folder" in lines[1]
    out, _ = ended(python(served, tmp_path/"home", script + code.format([good])))
    assert out.split() == ["videos/000-panda.gif", "0"] and (tmp_path/"videos/000-panda.gif").stat().st_size > 500


def test_a_local_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"t2v-turbo-ms").mkdir()
    assert student_folder("t2v-turbo-ms") == Path("t2v-turbo-ms")


@pytest.mark.parametrize("name, near", [("t2v-turbo-m", "t2v-turbo-ms"), ("T2V-Turbo-VC2", "t2v-turbo-vc2"), ("t2v_turbo_v2_no_mg", "t2v-turbo-v2-no-mg")])
def test_a_misspelt_name(name, near):
    with pytest.raises(UserError, match=f"there is no student '{name}' .did you mean '{near}'.*: give the folder of a student"): student_folder(name)


def test_the_tables_are_whole():
    "Every teacher that `plan` or `load_teacher` knows has a source, and every student a teacher"
    assert {*PLANNED, *SHIPPED} == TEACHERS.keys() and {s.teacher for s in STUDENTS.values()} < TEACHERS.keys() & DEFAULTS.keys()
    assert published_student("owner/model") is None
