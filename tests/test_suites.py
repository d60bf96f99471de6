"Prompt suites: names, counts, seeds, resuming, several processes"
import csv
import hashlib
import json
import socket
import subprocess
import sys

import av
import pytest
import torch

from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.pipeline import T2VTurboPipeline
from t2v_turbo.suites import by_student, by_teacher, generate, jobs, read_suite, video_seed
from t2v_turbo.teachers.tiny import WEIGHTS, load_teacher

SETTINGS = dict(model="noise", suite="vbench")


def noise(prompts, seeds):
    "A stand-in for a model, which says what it was asked"
    noise.asked += zip(prompts, seeds)
    return torch.stack([torch.rand(3, 4, 32, 32, generator=make_gen(s)) for s in seeds])


@pytest.fixture(autouse=True)
def nothing_asked(): noise.asked = []


def names(out): return sorted(p.name for p in (out / "videos").iterdir())


# --- prompts ---------------------------------------------------------------------------------------

def test_fetched_by_hash(tmp_path, monkeypatch, capsys):
    "Through the command; nothing is left of a text that is not the published one"
    from t2v_turbo import suites
    from t2v_turbo.cli import main
    web = tmp_path / "prompt700.txt"; web.write_text("a red fish moving left in the sea\n")
    sha = hashlib.sha256(web.read_bytes()).hexdigest()
    assert all(len(s) == 64 and "/main/" not in url and url.startswith("https://") for url, s in suites.PUBLISHED.values())
    call = lambda o: main(["generate", "--suite", "evalcrafter", "--prompts", "fetch", "--out", str(tmp_path / o)])
    monkeypatch.setitem(suites.PUBLISHED, "evalcrafter", (web.as_uri(), sha))
    assert call("a") == 0 and (tmp_path / "a" / "prompt700.txt").read_bytes() == web.read_bytes()
    web.write_text("a blue fish moving left in the sea\n")
    assert call("a") == 0, "the copy that is there is used"
    assert call("b") == 2 and "is not the published text" in capsys.readouterr().err and not (tmp_path / "b").exists()
    monkeypatch.setitem(suites.PUBLISHED, "evalcrafter", ((tmp_path / "none").as_uri(), sha))
    assert call("c") == 2 and "give its path" in capsys.readouterr().err


def test_full_info(tmp_path):
    rows = [dict(prompt_en="a cat", dimension=["color", "scene"]), dict(prompt_en="still", dimension=["temporal_flickering"]),
            dict(prompt_en="a cat", dimension=["temporal_style"]), dict(prompt_en="façades ", dimension=["scene"])]
    (tmp_path / "i.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert read_suite(tmp_path / "i.json", "vbench") == [("a cat", 5), ("still", 25), ("façades", 5)]


def test_folder_and_lines(tmp_path):
    (tmp_path / "color.txt").write_text("a cat\n\nstill\r\n")
    (tmp_path / "temporal_flickering.txt").write_text("still")
    (tmp_path / "._color.txt").write_bytes(b"\0\5\x16\7\xff")                # as a Mac leaves them
    assert read_suite(tmp_path, "vbench") == [("a cat", 5), ("still", 25)]
    assert read_suite(tmp_path / "temporal_flickering.txt", "vbench") == [("still", 25)]
    assert read_suite(tmp_path / "color.txt", "vbench") == [("a cat", 5), ("still", 5)]


def test_evalcrafter(tmp_path):
    path = tmp_path / "prompt700.txt"
    path.write_text("\n".join(["a cat / a dog"] + [f"prompt {i % 9}" for i in range(699)]))
    got = jobs(read_suite(path, "evalcrafter"), "evalcrafter")
    assert len(got) == 700 and (got[0].file, got[0].prompt) == ("0000.mp4", "a cat / a dog") and got[-1].file == "0699.mp4"
    assert len({j.seed for j in got}) == 700
    path.write_text("a\n\nb")
    with pytest.raises(UserError, match="line 2 of"): read_suite(path, "evalcrafter")


@pytest.mark.parametrize("text, match", [("[]", "no prompt"), ("{}", "not VBench's"), ("[1]", "not VBench's"),
                                         ('[{"prompt_en": "x"}]', "not VBench's"), ("x", "not VBench's")])
def test_bad_json(tmp_path, text, match):
    (tmp_path / "i.json").write_text(text)
    with pytest.raises(UserError, match=match): read_suite(tmp_path / "i.json", "vbench")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no prompts at"): read_suite(tmp_path / "no.txt", "vbench")
    with pytest.raises(UserError, match="holds no .txt"): read_suite(tmp_path, "vbench")
    with pytest.raises(UserError, match="cannot read"): read_suite(tmp_path, "evalcrafter")
    (tmp_path / "x.txt").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="cannot read"): read_suite(tmp_path / "x.txt", "vbench")
    (tmp_path / "x.txt").write_text("\n")
    with pytest.raises(UserError): read_suite(tmp_path / "x.txt", "vbench")
    with pytest.raises(UserError, match="suite 'x'"): read_suite(tmp_path, "x")


# --- names and seeds -------------------------------------------------------------------------------

def test_names_as_vbench_looks_for_them():
    got = jobs([("A 3D model of a 1800s victorian house.", 5), ("still", 25)], "vbench")
    assert [j.file for j in got[:5]] == [f"A 3D model of a 1800s victorian house.-{i}.mp4" for i in range(5)]
    assert [j.file for j in got[5:]] == [f"still-{i}.mp4" for i in range(25)]
    assert len({j.seed for j in got}) == 30 and all(0 <= j.seed < 2**48 for j in got)


@pytest.mark.parametrize("prompt", ["a/b", "a\0b", "x" * 260, "é" * 130])
def test_prompts_without_a_file_name(prompt):
    with pytest.raises(UserError, match="cannot be a file name"): jobs([(prompt, 5)], "vbench")


def test_seeds_do_not_depend_on_company():
    a, b = jobs([("x", 5), ("y", 5)], "vbench"), jobs([("y", 25), ("z", 5)], "vbench")
    assert a[5:] == b[:5]
    assert {j.seed for j in a}.isdisjoint(j.seed for j in jobs([("x", 5), ("y", 5)], "vbench", seed=1))
    assert video_seed("x-0.mp4", 0) == a[0].seed == 77515548552189


# --- writing ---------------------------------------------------------------------------------------

def test_writes_resumes_and_repairs(tmp_path, capsys):
    todo = jobs([("a cat", 5)], "vbench")
    assert generate(noise, todo[:3], tmp_path, SETTINGS, batch=2) == 3
    assert names(tmp_path) == [j.file for j in todo[:3]]
    assert noise.asked == [(j.prompt, j.seed) for j in todo[:3]]
    before = (tmp_path / "videos" / todo[0].file).read_bytes()
    (tmp_path / "videos" / todo[1].file).write_bytes(before[:200])
    noise.asked = []
    assert generate(noise, todo, tmp_path, SETTINGS) == 3                # two new ones, one broken
    assert [s for _, s in noise.asked] == [todo[i].seed for i in (1, 3, 4)]
    assert "made again" in capsys.readouterr().out
    assert (tmp_path / "videos" / todo[0].file).read_bytes() == before
    assert generate(noise, todo, tmp_path, SETTINGS) == 0
    with av.open(str(tmp_path / "videos" / todo[1].file)) as f:
        assert f.streams.video[0].frames == 4 and f.streams.video[0].average_rate == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["settings.json", "videos", "videos.csv"]


def test_a_stop_leaves_no_half_video(tmp_path):
    todo = jobs([("a cat", 5)], "vbench")
    def stops(prompts, seeds):
        if len(noise.asked) == 2: raise KeyboardInterrupt
        return noise(prompts, seeds)
    with pytest.raises(KeyboardInterrupt): generate(stops, todo, tmp_path, SETTINGS, batch=1)
    assert names(tmp_path) == [j.file for j in todo[:2]]
    assert generate(noise, todo, tmp_path, SETTINGS) == 3


def test_seeds_are_recorded_and_kept(tmp_path):
    first, second = jobs([("a cat", 1)], "vbench"), jobs([('a, "dog"', 2)], "vbench")
    generate(noise, first, tmp_path, SETTINGS)
    generate(noise, second, tmp_path, SETTINGS)
    rows = list(csv.DictReader(open(tmp_path / "videos.csv", newline="")))
    assert [(r["file"], r["prompt"], int(r["seed"])) for r in rows] == [(j.file, j.prompt, j.seed) for j in first + second]


def test_other_settings_are_refused(tmp_path):
    todo = jobs([("a cat", 1)], "vbench")
    generate(noise, todo, tmp_path, SETTINGS)
    for other in (SETTINGS | dict(model="x"), SETTINGS | dict(steps=3), dict(model="noise")):
        with pytest.raises(UserError, match="holds videos with"): generate(noise, todo, tmp_path, other)
    with pytest.raises(UserError, match="no videos to make"): generate(noise, [], tmp_path, SETTINGS)
    with pytest.raises(UserError, match="batch is 0"): generate(noise, todo, tmp_path, SETTINGS, batch=0)
    for text in ("[]", "{", "3"):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(UserError, match="settings.json does not say what videos .* give another output folder"): generate(noise, todo, tmp_path, SETTINGS)
    (tmp_path / "settings.json").unlink(); (tmp_path / "videos.csv").write_text("id,url\n1,x\n")
    with pytest.raises(UserError, match="videos.csv is no table of file, prompt, seed"): generate(noise, todo, tmp_path, SETTINGS)
    assert not (tmp_path / "settings.json").exists()


SCRIPT = """
import sys, torch
from t2v_turbo.core import make_gen
from t2v_turbo.suites import generate, jobs, processes
def noise(prompts, seeds): return torch.stack([torch.rand(3, 4, 32, 32, generator=make_gen(s)) for s in seeds])
n = generate(noise, jobs([("a cat", 5), ("a dog", 2)], "vbench"), sys.argv[1], dict(model="noise", suite="vbench"))
print(f"rank {processes().process_index} of {processes().num_processes} made {n}")
"""


def test_two_processes_make_the_same_videos(tmp_path):
    (tmp_path / "s.py").write_text(SCRIPT)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                          "--master_port", str(port),
                          str(tmp_path / "s.py"), str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "rank 0 of 2 made 4" in run.stdout and "rank 1 of 2 made 3" in run.stdout
    todo = jobs([("a cat", 5), ("a dog", 2)], "vbench")
    generate(noise, todo, tmp_path / "one", SETTINGS)
    assert names(tmp_path / "one") == names(tmp_path / "two") == sorted(j.file for j in todo)
    for j in todo: assert (tmp_path / "one/videos" / j.file).read_bytes() == (tmp_path / "two/videos" / j.file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["settings.json", "videos", "videos.csv"]


# --- models ----------------------------------------------------------------------------------------

def test_student_alone_or_in_a_batch():
    sample = by_student(T2VTurboPipeline.from_pretrained(WEIGHTS / "tiny-cd"), steps=2)
    prompts, seeds = ["a red fish moving left in the sea", "a blue cat growing in the meadow"], [5, 6]
    both = sample(prompts, seeds)
    assert both.shape[:3] == (2, 3, 8)
    torch.testing.assert_close(sample(prompts[1:], seeds[1:]), both[1:], atol=1e-4, rtol=0)
    assert not torch.allclose(sample(prompts[:1], [6]), both[:1], atol=1e-2)


def test_models_start_from_the_same_noise(monkeypatch):
    teacher, pipe, seen = load_teacher("tiny"), T2VTurboPipeline.from_pretrained(WEIGHTS / "tiny-cd"), []
    def spy(den):
        forward = den.forward
        def first(z, *args, **kw):
            seen.append(z.clone()); return forward(z, *args, **kw)
        monkeypatch.setattr(den, "forward", first)
    spy(teacher.denoiser); spy(pipe.denoiser)
    by_teacher(teacher, steps=1)(["a red fish moving left in the sea"], [7])
    at = len(seen)
    by_student(pipe, steps=1)(["a red fish moving left in the sea"], [7])
    torch.testing.assert_close(seen[0][:1], seen[at][:1])
