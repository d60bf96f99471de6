"Settings by name and settings of an earlier run: what the user gives wins, and no run is written over"
import json

import pytest
from safetensors.torch import load_file

from t2v_turbo import ablate as grids
from t2v_turbo import running
from t2v_turbo.cli import VERBS, main, read
from t2v_turbo.files import UserError, write_json
from t2v_turbo.options import options_of
from t2v_turbo.recipes import RECIPES, left_to_teacher
from t2v_turbo.running import read_config
from t2v_turbo.teachers.folders import DEFAULTS
from t2v_turbo.train import Config

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
    assert (s["shape"], s["image_frames"], s["video_frames"], s["batch"], s["steps"], s["eval_every"], s["dtype"]) == ("raw", 6, 8, 8, 10000, 0, "bfloat16")


def test_the_list_of_recipes(capsys):
    assert main(["recipes"]) == 0
    table = capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(["distill", "--recipe", "list"])
    assert e.value.code == 0 and capsys.readouterr().out == table
    for name, r in RECIPES.items(): assert f"\n{name} " in "\n" + table and r.about in table
    assert "--dtype bfloat16" in table and "--save_memory denoiser,decode" in table


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
        assert main(["distill", *FEW, "--w_max", "4", "--seed", "3", "--match_official", "--out", str(out)]) == 0
    return out


def test_a_run_notes_every_option(run):
    held = json.loads((run / "settings.json").read_text())
    assert held["command"] == "distill" and held["settings"].keys() == OPTIONS["distill"].keys()
    got = {n: held["settings"][n] for n in ("steps", "w_max", "seed", "match_official", "shape", "beta_vid", "repeats", "track")}
    assert got == dict(steps=2, w_max=4., seed=3, match_official=True, shape="log_sigmoid", beta_vid=1., repeats=1, track="")


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
    assert (got["seed"], got["match_official"], got["w_max"], got["out"]) == (7, False, 4., "x")


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
