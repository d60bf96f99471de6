"Settings by name and settings of an earlier run: what the user gives wins, and no run is written over"
import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from t2v_turbo import ablate as grids
from t2v_turbo import running
from t2v_turbo.cli import VERBS, main, read
from t2v_turbo.core import write_video
from t2v_turbo.files import UserError, write_json
from t2v_turbo.fit import GB, RESERVE
from t2v_turbo.options import options_of
from t2v_turbo.plan import predict
from t2v_turbo.recipes import GPUS, RECIPES, left_to_teacher, setup_of
from t2v_turbo.running import read_config
from t2v_turbo.small import small_teacher
from t2v_turbo.standins import tiny_modelscope, tiny_sana, tiny_wan, tiny_wan22
from t2v_turbo.teachers.folders import DEFAULTS
from t2v_turbo.teachers.wan import save_wan
from t2v_turbo.train import Config
from t2v_turbo.world import World

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("tools_recipes", ROOT / "tools/recipes.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)
HELD = json.loads(pages.HELD.read_text(encoding="utf-8"))
OPTIONS = {v.name: {o.name: o for o in options_of(v)} for v in VERBS}
FEW = "--steps 2 --batch 1 --rank 2 --repeats 1 --eval_every 0 --track".split() + [""]


def values(*words): return read([str(w) for w in words])[1]


def sentence(capsys, *words):
    assert main([str(w) for w in words]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("t2v-turbo: ") and len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("verb", ["distill", "ablate"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_of_options(name, verb):
    for k, v in RECIPES[name].settings.items():
        o = OPTIONS[verb][k]
        assert isinstance(v, o.kind) and (not o.choices or v in o.choices), k
    assert values(verb, "--recipe", name) == RECIPES[name].settings


def test_what_the_user_gives_wins():
    got = values("distill", "--recipe", "modelscope-16gb", "--teacher", "tiny", "--steps", "3", "--dtype", "float32", "--save_memory", "", "--no-compile")
    assert (got["teacher"], got["steps"], got["dtype"], got["save_memory"], got["shape"], got["compile"]) == ("tiny", 3, "float32", "", "raw", False)
    assert read_config(values("distill", "--recipe", "tiny")) == Config()


@pytest.mark.parametrize("name, kind, flags", [("modelscope-16gb", "modelscope", dict(beta_img=2, beta_vid=3, k=20, w_min=5, w_max=15, rank=32, lr=1e-5)),
                                               ("videocrafter2-8x", "videocrafter2", dict(beta_img=1, beta_vid=2, k=20, w_min=5, w_max=15, rank=64, lr=1e-5))])
def test_recipe_and_teacher_together_are_the_command_of_the_tutorial(name, kind, flags):
    s = RECIPES[name].settings
    assert {k: getattr(DEFAULTS[kind], k) for k in flags} == flags and not flags.keys() & s.keys()
    assert (s["shape"], s["image_frames"], s["video_frames"], s["batch"], s["steps"], s["eval_every"], s["lora_dropout"]) == ("raw", 6, 8, 8, 10000, 0, .1)
    assert s["dtype"] == ("float16" if RECIPES[name].gpu == 16 else "bfloat16")


def test_the_list_of_recipes(capsys):
    assert main(["recipes"]) == 0
    table = capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(["distill", "--recipe", "list"])
    assert e.value.code == 0 and capsys.readouterr().out == table
    for name, r in RECIPES.items(): assert f"\n{name} " in "\n" + table and r.about in table
    assert "--dtype float16" in table and "--dtype bfloat16" in table and "--save_memory denoiser,decode" in table


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.gpu])
def test_a_recipe_fits_its_gpu(name):
    "By what was predicted for the page, of today's settings"
    assert HELD[name]["total"] + RESERVE <= GPUS[RECIPES[name].gpu].memory
    assert RECIPES[name].processes > 1 or name.endswith(f"-{RECIPES[name].gpu}gb")
    assert pages.RESERVE == RESERVE and not pages.stale(HELD)


@pytest.mark.parametrize("name", ["modelscope-16gb", "modelscope-full-48gb", "videocrafter2-16gb"])
def test_the_predictor_says_so(name):
    "With LoRA, without, and with caches; the others are as long, and are predicted again when their settings change"
    p, held = predict(setup_of(name)), HELD[name]
    assert p.total / GB == pytest.approx(held["total"], rel=.01) and p.highest == held["highest"]


def test_what_has_no_recipe_does_not_fit():
    for n in ("wan-48gb", "sana-48gb"): assert HELD[n]["total"] - 1 + RESERVE > GPUS[24].memory
    assert HELD["wan2.2-80gb"]["total"] > GPUS[48].memory and all(r.gpu > 24 for n, r in RECIPES.items() if n.startswith(("wan", "sana")))
    assert all(HELD[n]["total"] + RESERVE > GPUS[24].memory for n, r in RECIPES.items() if r.settings.get("rank") == 0)


def test_the_page_is_of_today(tmp_path, monkeypatch):
    text = pages.PAGE.read_text(encoding="utf-8")
    pages.main(["--check"])
    for n, r in RECIPES.items():
        if r.gpu: assert f"### {n}" in text and f"{HELD[n]['total']:.1f} GB at its peak" in text and pages.command(n) in text
    monkeypatch.setattr(pages, "PAGE", tmp_path / "p.ipynb")
    (tmp_path / "p.ipynb").write_text(text.replace("| open |", "| 81 |"))
    with pytest.raises(SystemExit, match="not of today"): pages.main(["--check"])
    monkeypatch.setattr(pages, "stale", lambda held: ["wan-48gb"])
    with pytest.raises(SystemExit, match="wan-48gb changed"): pages.main([])


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    "Teachers in the published layouts, clips and prompts"
    at = tmp_path_factory.mktemp("layouts")
    small_teacher("videocrafter2", at / "videocrafter2")
    tiny_modelscope(at / "modelscope")
    save_wan(tiny_wan(), at / "wan")
    save_wan(tiny_wan22(), at / "wan2.2")
    tiny_sana(at / "sana")
    (at / "clips").mkdir()
    for i, (clip, caption) in enumerate(zip(*World("train", 0, 33, 32).batch(0, 2))):
        write_video(at / f"clips/{i}.mp4", clip, 8)
        (at / f"clips/{i}.txt").write_text(caption)
    (at / "prompts.txt").write_text("a red fish moving left in the sea\na blue car moving up in the desert\n")
    return at


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_a_recipe_in_small(name, layouts, tmp_path):
    "On its published layout with its own precision, switches and frames; the rewards of the tiny world stand in, and prompts for caches"
    s, kind = RECIPES[name].settings, name.split("-")[0]
    flow = lambda n: ["--frames", 17, "--height", n, "--width", n]
    small = {"modelscope": ["--frames", 8], "videocrafter2": ["--frames", 8, "--height", 16, "--width", 16], "wan": flow(32), "wan2.2": flow(64), "sana": flow(32), "tiny": []}[kind]
    data = [] if kind == "tiny" else ["--data", layouts / ("prompts.txt" if "data" in s else "clips"), "--teacher", layouts / kind, "--vocabulary", "",
                                      "--reward", "tiny-image,tiny-video", "--accumulate", min(2, s["accumulate"])]
    words = ["distill", "--recipe", name, *data, *small, "--steps", 2, "--batch", 2, "--teacher_steps", 2, "--track", "", "--eval_every", 0, "--out", tmp_path / "o"]
    assert main([str(w) for w in words]) == 0
    rows = [json.loads(l) for l in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(r["loss"] is not None and (kind == "tiny" or r["r_img"] and r["r_vid"]) for r in rows)
    config = json.loads((tmp_path / "o/student/student.json").read_text())["about"]["config"]
    assert {k: config[k] for k in ("lr", "lr_schedule")} == dict(lr=DEFAULTS["tiny"].lr if kind == "tiny" else 1e-5, lr_schedule=DEFAULTS["tiny"].lr_schedule if kind == "tiny" else "constant")
    assert kind == "tiny" or (config["objective"]["image_frames"], config["objective"]["video_frames"], config["objective"]["shape"]) == (6, 8, "raw")


def test_a_recipe_of_lora_refuses_full_fine_tuning(capsys, tmp_path):
    told = sentence(capsys, "distill", "--recipe", "modelscope-16gb", "--rank", 0, "--out", tmp_path / "o")
    assert told.endswith("was planned with LoRA, and full fine-tuning takes more memory: leave out --rank 0 or give --recipe modelscope-full-48gb")
    assert sentence(capsys, "distill", "--recipe", "wan-48gb", "--rank", 0).endswith("more memory: leave out --rank 0")
    assert values("distill", "--recipe", "modelscope-16gb", "--rank", 0, "--teacher", "tiny")["rank"] == 0
    assert values("distill", "--recipe", "tiny", "--rank", 0)["rank"] == 0


def test_prompts_alone(tmp_path, capsys):
    "Teacher's samples, cached, then distilled by one command; again, it only goes on; other settings are one sentence"
    (tmp_path / "p.txt").write_text("a red fish moving left in the sea\na blue car moving up in the desert\n")
    words = ["distill", "--data", tmp_path / "p.txt", "--teacher_steps", 2, "--samples", 4, *FEW, "--out", tmp_path / "o"]
    assert main(list(map(str, words))) == 0
    made = {p: p.stat().st_mtime_ns for d in ("latents", "texts") for p in (tmp_path / "o" / d).iterdir()}
    about = json.loads((tmp_path / "o/latents/cache.json").read_text())
    assert (about["kind"], about["samples"], about["steps"], about["w"]) == ("samples", 4, 2, DEFAULTS["tiny"].guidance)
    assert json.loads((tmp_path / "o/settings.json").read_text())["settings"]["data"] == str(tmp_path / "p.txt")
    capsys.readouterr()
    assert main(list(map(str, words))) == 0 and "resumed at step 2 of 2" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert "was built with steps 2, not 3" in sentence(capsys, *words, "--teacher_steps", 3)
    assert "a cache can grow, not shrink" in sentence(capsys, *words, "--samples", 3)
    assert "samples is -1: give 0 or more" in sentence(capsys, "distill", "--data", tmp_path / "p.txt", "--samples", -1, "--out", tmp_path / "x")
    told = sentence(capsys, "distill", "--data", tmp_path / "p.txt", "--teacher", tiny_modelscope(tmp_path / "ms"), "--out", tmp_path / "x")
    assert "beta_img is 2" in told and not (tmp_path / "x").exists()                       # before anything is sampled


def test_a_recipe_that_is_none(capsys, tmp_path):
    told = sentence(capsys, "distill", "--recipe", "modelscope-16", "--out", tmp_path / "o")
    assert "no recipe 'modelscope-16': give one of tiny, modelscope-16gb" in told and told.endswith("did you mean modelscope-16gb?")
    assert "give --recipe or --config, not both" in sentence(capsys, "distill", "--recipe", "tiny", "--config", tmp_path)


def test_values_of_teachers_are_read_without_them():
    words = left_to_teacher()
    for n, text in words.items(): assert text == "the teacher's; " + ", ".join(f"{k} {getattr(d, n)}" for k, d in DEFAULTS.items())
    assert {"lr", "rank", "w_max", "beta_img"} <= words.keys() and not {"reward", "guidance"} & words.keys()


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    "The table at the end takes longer than all the rest, and has its own tests"
    monkeypatch.setattr(running, "report", lambda *_: {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short training that is done, with settings that differ from the defaults"
    out = tmp_path_factory.mktemp("runs") / "a"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(running, "report", lambda *_: {})
        assert main(["distill", *FEW, "--w_max", "5", "--seed", "3", "--match_official", "--out", str(out)]) == 0
    return out


def test_a_run_notes_every_option(run):
    held = json.loads((run / "settings.json").read_text())
    assert held["command"] == "distill" and held["settings"].keys() == OPTIONS["distill"].keys()
    got = {n: held["settings"][n] for n in ("steps", "w_max", "seed", "match_official", "shape", "beta_vid", "repeats", "track")}
    assert got == dict(steps=2, w_max=5., seed=3, match_official=True, shape="log_sigmoid", beta_vid=.02, repeats=1, track="")


def test_settings_given_back_train_the_same_student(run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert main(["distill", "--config", str(run), "--out", str(tmp_path / "b")]) == 0
    a, b = (load_file(next((d / "student").glob("*.safetensors"))) for d in (run, tmp_path / "b"))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    old, new = (json.loads((d / "settings.json").read_text())["settings"] for d in (run, tmp_path / "b"))
    assert new == old | dict(out=str(tmp_path / "b"))
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_the_folder_of_a_run_is_not_taken_over(run, capsys):
    for config in (run, run / "settings.json"):
        told = sentence(capsys, "distill", "--config", config, "--steps", "3")
        assert f"holds the settings of a run in '{run}': add --out DIR for a new run, or --out {run} to resume that run" in told
    assert values("distill", "--config", run, "--out", run)["out"] == str(run)
    assert main(["distill", "--config", str(run), "--out", str(run)]) == 0 and "resumed at step 2 of 2" in capsys.readouterr().out


def test_flags_win_over_the_file(run):
    got = values("distill", "--config", run, "--out", "x", "--seed", "7", "--no-match_official")
    assert (got["seed"], got["match_official"], got["w_max"], got["out"]) == (7, False, 5., "x")


@pytest.mark.parametrize("text, says", [("{", "is not a JSON object: give --config the settings.json of a run"), ("[1]", "is not a JSON object"),
                                        ('{"step": 3, "k": 20}', "`distill` has no 'step', which"), ('{"steps": "3"}', "steps is '3': give a whole number"),
                                        ('{"shape": "x"}', "shape 'x': give log_sigmoid or raw"), ('{"compile": 2.5}', "compile is 2.5: give a whole number"),
                                        ('{"steps": 0}', "steps is 0: give 1 or more")])
def test_files_that_are_refused(text, says, tmp_path, capsys):
    (tmp_path / "s.json").write_text(text)
    assert says in sentence(capsys, "distill", "--config", tmp_path / "s.json", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert "give --config the settings.json of a run, or its folder" in sentence(capsys, "distill", "--config", tmp_path, "--out", tmp_path / "o")


def test_a_file_by_hand_may_name_its_folder(tmp_path):
    (tmp_path / "s.json").write_text('{"out": "runs/mine", "steps": 9, "lr": null}')
    assert values("distill", "--config", tmp_path / "s.json") == dict(out="runs/mine", steps=9, lr=None)
    assert read_config(values("distill", "--config", tmp_path / "s.json")).lr == Config().lr


def test_ablate_takes_its_own_settings(tmp_path, capsys, monkeypatch):
    "And refuses those of `distill` that it does not have, by name; the grid itself is run in the notebook"
    a, b = tmp_path / "a", tmp_path / "b"
    def grid(cfg, o, looks): write_json(cfg.out + "/ablation.json", {}); return []
    monkeypatch.setattr(grids, "ablate", grid)
    monkeypatch.setattr(grids, "ablation_table", lambda rows: "")
    assert main(["ablate", *"--steps 1 --seeds 0 --jobs 1 --clips_each 1 --over beta_img=0 --out".split(), str(a)]) == 0
    capsys.readouterr()
    held = json.loads((a / "settings.json").read_text())
    assert held["command"] == "ablate" and held["settings"].keys() == OPTIONS["ablate"].keys()
    assert "add --out DIR" in sentence(capsys, "ablate", "--config", a)
    got = values("ablate", "--config", a, "--out", b, "--clips_each", 2)
    assert got == held["settings"] | dict(out=str(b), clips_each=2)
    assert main(["ablate", "--config", str(a), "--out", str(b)]) == 0
    new = json.loads((b / "settings.json").read_text())["settings"]
    assert new == held["settings"] | dict(out=str(b))
    (a / "other.json").write_text(json.dumps(dict(repeats=3, seed=1, k=20)))
    capsys.readouterr()
    assert "`ablate` has no 'repeats', 'seed', which" in sentence(capsys, "ablate", "--config", a / "other.json", "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_refused_ablation_writes_nothing(tmp_path):
    assert main(["ablate", "--over", "k=7", "--out", str(tmp_path / "o")]) == 2 and not (tmp_path / "o").exists()
    with pytest.raises(UserError): read(["ablate", "--config", str(tmp_path / "o")])
