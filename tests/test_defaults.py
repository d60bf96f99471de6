"A teacher brings its own settings, a student its own sampling; commands and Python agree"
import ast
import json
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import t2v_turbo
from t2v_turbo import cli, config, judges, running, train
from t2v_turbo.cli import main, read
from t2v_turbo.config import check_rewards, lr_at, objective_of
from t2v_turbo.core import write_video
from t2v_turbo.distill import Objective
from t2v_turbo.files import UserError
from t2v_turbo.judges import held_captions
from t2v_turbo.preparing import CacheOptions, PlanOptions
from t2v_turbo.saved import save_student
from t2v_turbo.standins import tiny_modelscope, tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.suites import by_teacher
from t2v_turbo.teachers import folders
from t2v_turbo.teachers.folders import DEFAULTS, Defaults, defaults_of, in_tiny_world, load_teacher
from t2v_turbo.teachers.tiny import save_teacher
from t2v_turbo.teachers.wan import save_wan
from t2v_turbo.train import Config, Trainer
from t2v_turbo.using import GenerateOptions, SampleOptions, sampled_as

BRINGS = [f.name for f in fields(Objective) if f.name in {f.name for f in fields(Defaults)}]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    "Folders in the layouts of ModelScopeT2V, of VideoCrafter2, of Wan, and of the tiny teacher"
    at = tmp_path_factory.mktemp("teachers")
    for n in ("ms", "vc2"): tiny_modelscope(at / n)
    (at / "vc2/teacher.json").write_text(json.dumps(dict(kind="videocrafter2", frames=16, fps=16)))
    save_wan(tiny_wan(), at / "wan")
    save_teacher(load_teacher("tiny-flow"), at / "flow")
    return at


KINDS = dict(tiny="tiny", ms="modelscope", vc2="videocrafter2", wan="wan", flow="tiny")
name = lambda at, kind: "tiny" if kind == "tiny" else str(at / kind)


def told(*argv):
    "The settings that a command line describes"
    return running.read_config(read(["distill", *map(str, argv)])[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_and_python_train_alike(at, kind):
    own, teacher = DEFAULTS[KINDS[kind]], name(at, kind)
    c = Config(teacher=teacher)
    assert told("--teacher", teacher) == c
    assert (c.lr, c.lr_schedule, c.rank) == (own.lr, own.lr_schedule, own.rank)
    assert {n: getattr(c.objective, n) for n in BRINGS} == {n: getattr(own, n) for n in BRINGS} and len(BRINGS) == 7
    some = told("--teacher", teacher, "--w_max", 40, "--lr", 1e-2)            # what is given wins, and nothing else changes
    assert some == Config(teacher=teacher, lr=1e-2, objective=objective_of(teacher, w_max=40.)) == replace(c, lr=1e-2, objective=replace(c.objective, w_max=40.))
    whole = Objective(k=50)
    assert Config(teacher=teacher, objective=whole, rank=3).objective is whole and Config(teacher=teacher, rank=3).rank == 3


@pytest.mark.parametrize("option, value, says", [("out", "", "out is empty"), ("w_max", "inf", "w range .1.0, inf. is empty, negative or infinite"),
                                                 ("huber_c", "nan", "huber_c is nan"), ("huber_c", "-1", "huber_c is -1"), ("huber_c", "0", "huber_c is 0"),
                                                 ("warmup", "200", "warmup is 200 but the run has 200 steps"), ("warmup", "-1", "warmup is -1"), ("rank", "-1", "rank is -1"),
                                                 ("lora_dropout", "1", "give a probability in"), ("lora_dropout", "nan", "give a probability in")])
def test_settings_that_cannot_be_meant(option, value, says):
    with pytest.raises(UserError, match=says): told(f"--{option}", value)


def test_a_bare_run_takes_the_tiny_teachers():
    "A bare `Objective` holds settings for small examples"
    assert Config().objective == objective_of("tiny") != Objective() and replace(Config(teacher="tiny-flow"), teacher="tiny") == Config()


def test_of_a_model_on_the_hub_one_small_file_is_fetched(at, monkeypatch):
    asked = []
    def small(name, path, revision=None): asked.append((revision, path)); return str(at / "ms" / path)
    def whole(*_, **__): raise AssertionError("gigabytes")
    monkeypatch.setattr(folders, "hf_hub_download", small)
    monkeypatch.setattr(folders, "local_folder", whole)
    assert defaults_of("someone/a-model@main") == DEFAULTS["modelscope"] and set(asked) == {("main", "model_index.json"), ("main", "teacher.json")}
    with pytest.raises(UserError, match="add --reward hpsv2.1=1,viclip-l14=1 or --beta_img 0 --beta_vid 0"): Trainer(Config(teacher="someone/a-model", track=""))


def test_an_installed_package_may_bring_defaults(at, monkeypatch):
    def load(folder, **options): raise AssertionError("not needed")
    monkeypatch.setitem(folders.LOADERS, "Strange", load)
    (at / "strange/denoiser").mkdir(parents=True, exist_ok=True)
    (at / "strange/denoiser/config.json").write_text('{"_class_name": "Strange"}')
    assert defaults_of(str(at / "strange")) == DEFAULTS["videocrafter2"]
    load.defaults = dict(w_min=1., w_max=9., guidance=6.)
    assert Config(teacher=str(at / "strange")).objective.w_max == 9. and defaults_of(str(at / "strange")).lr == DEFAULTS["videocrafter2"].lr
    load.defaults = dict(learning_rate=1.)
    with pytest.raises(UserError, match=r"offers unknown defaults \(learning_rate\): it may set steps, lr,"): defaults_of(str(at / "strange"))


@pytest.mark.parametrize("more, says", [([], "beta_img is 1 and beta_vid is 2, but teacher {!r} has no image and no video reward: add --reward hpsv2.1=1,internvideo2=1 or --beta_img 0 --beta_vid 0"),
                                        (["--beta_img", "0"], "beta_vid is 2, but teacher {!r} has no video reward: add --reward internvideo2=1 or --beta_vid 0"),
                                        (["--reward", "viclip-b16=3"], "beta_img is 1, but teacher {!r} has no image reward: add --reward viclip-b16=3,hpsv2.1=1 or --beta_img 0")])
def test_a_real_teacher_without_a_reward(at, tmp_path, capsys, monkeypatch, more, says):
    "Refused before anything is loaded; the line to paste is accepted"
    monkeypatch.setattr(train, "load_teacher", lambda *_, **__: 1 / 0)
    teacher = name(at, "vc2")
    assert main(["distill", "--teacher", teacher, "--data", str(tmp_path), "--out", str(tmp_path / "o"), *more]) == 2
    assert capsys.readouterr().err.strip() == "t2v-turbo: " + says.format(teacher) and not (tmp_path / "o").exists()
    words = says.split("add ")[1].split(" or ")
    for w in words: check_rewards(told("--teacher", teacher, *more, *w.split()))
    assert main(["ablate", "--teacher", teacher, "--over", "rank=2", "--seeds", "0", "--out", str(tmp_path / "o"), *more]) == 2
    assert says.format(teacher) in capsys.readouterr().err


def test_rewards_that_are_given_in_python_count(at):
    c = Config(teacher=name(at, "ms"))
    check_rewards(c, image_reward=torch.nn.Identity(), video_reward=torch.nn.Identity())
    with pytest.raises(UserError, match="beta_vid is 3, but .* has no video reward"): check_rewards(c, image_reward=torch.nn.Identity())
    with pytest.raises(UserError, match="add --reward tiny-image,tiny-video=1 or --beta_vid 0"): check_rewards(Config(reward="tiny-image"))


def clips(folder, text):
    folder.mkdir()
    write_video(folder / "0.mp4", torch.rand(3, 16, 32, 32), 8)
    (folder / "0.txt").write_text(text)
    return str(folder)


def test_words_that_a_tiny_reward_does_not_know(tmp_path):
    cfg = lambda text, **more: Config(out=str(tmp_path / "o"), batch=1, rank=1, track="", data=clips(tmp_path / text.split()[-1], text), **more)
    with pytest.warns(UserWarning, match=r"reward tiny-image and tiny-video does not know 2 words of the captions in .*\(cello, plays\)"):
        Trainer(cfg("a fish plays cello"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(cfg("a red fish moving left in the sea"))
        Trainer(cfg("a dog sleeping", objective=Objective(beta_img=0., beta_vid=0.)))


def test_the_learning_rate_of_each_step(tmp_path):
    rates = {}
    for how in ("linear", "constant"):
        t, rates[how] = Trainer(Config(out=str(tmp_path / how), steps=4, batch=1, rank=1, track="", lr=8e-4, lr_schedule=how)), []
        for _ in t.fit(): rates[how].append(t.engine.opt.param_groups[0]["lr"])
        assert rates[how] == [lr_at(t.cfg, n) for n in range(4)]
    assert rates["constant"] == [8e-4] * 4 and rates["linear"] == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4])


def test_the_precision_of_the_device(monkeypatch):
    monkeypatch.setattr(config, "pick_dtype", lambda device=None: torch.float16)
    assert Config().dtype == "float16" and Config(dtype="bfloat16").dtype == "bfloat16" and told().dtype == "float16"


def test_one_guidance_for_a_teacher(at, monkeypatch):
    "The table of a run, the videos of a suite and the latents of a cache take the same number"
    from t2v_turbo import suites
    seen = []
    monkeypatch.setattr(suites, "sample_teacher", lambda t, prompts, gen, steps, w: seen.append(w) or torch.zeros(1))
    for who in ("tiny", "tiny-flow", name(at, "ms"), name(at, "wan")): by_teacher(load_teacher(who))(["a"], [0])
    own = DEFAULTS["tiny"].guidance
    assert seen == [own, own, 7.5, 5.]
    made = {}
    monkeypatch.setattr("t2v_turbo.data.build.build_cache", lambda *a, **how: made.update(how))
    assert main(["cache", "samples", "c", "--teacher", name(at, "ms"), "--data", ""]) == 0 and made["w"] == 7.5
    assert main(["cache", "samples", "c", "--teacher", name(at, "ms"), "--w", "3", "--verify", "1", "--dtype_of_teacher", "bfloat16"]) == 0
    assert made["w"] == 3. and made["verify"] is True


def test_a_student_is_sampled_as_it_was_trained():
    own = dict(steps=8, w=7.5, origin=200)
    assert sampled_as(own, SampleOptions()) == own
    assert sampled_as(own, SampleOptions(w=0., origin=50)) == dict(steps=8, w=0., origin=50)
    assert sampled_as(dict(steps=50, w=4.), GenerateOptions(prompts="fetch", steps=3)) == dict(steps=3, w=4.)


def test_judges_of_the_tiny_world_judge_nobody_else(at, tmp_path, capsys):
    save_student(Student(load_teacher(name(at, "ms"), frames=4), 2), tmp_path / "s")
    assert main(["evaluate", "--student", str(tmp_path / "s"), "--steps", "1", "--repeats", "1"]) == 2
    assert "but the judges know the tiny world only" in capsys.readouterr().err
    assert in_tiny_world(str(at / "flow")) and not in_tiny_world(str(at / "wan"))


def test_the_best_look_is_what_is_reported(tmp_path, monkeypatch, capsys):
    "Where the rule stops a run, the student of the best look is kept, judged and named"
    from t2v_turbo import watch as watching
    kept, real = [], watching.watch
    def stopped(*args): real(*args); return 1
    monkeypatch.setattr(watching, "watch", stopped)
    monkeypatch.setattr(watching, "keep_best", lambda trainer, step: kept.append(step), raising=False)
    monkeypatch.setattr(judges, "held_captions", lambda: held_captions(4))
    got = running.distill(Config(out=str(tmp_path), steps=2, batch=1, rank=1, track=""), running.DistillOptions(repeats=1), watching.WatchOptions(eval_every=0))
    assert kept == [1] and [r["model"] for r in got["rows"]] == ["teacher", "cd", "turbo, best look at step 1"]
    assert "turbo, best look at step 1" in Path(got["results"]).read_text() and "best look at step 1" in Path(got["report"]).read_text()
    assert "the student of step 1 was kept" in capsys.readouterr().out


# --- options that messages recommend ------------------------------------------------------------------

FOREIGN = {"--mixed_precision", "--num_processes", "--config_file", "--multi_gpu", "--porcelain", "--untracked-files", "--abbrev-ref", "--no-deps",
           "--no-"}  # of accelerate, git and pip, and the start of every flag that is off


def flags():
    "Every option of every verb"
    found = set()
    def walk(p):
        for a in p._actions:
            found.update(a.option_strings)
            if isinstance(getattr(a, "choices", None), dict): [walk(q) for q in a.choices.values()]
    walk(cli.parser())
    return found


def sentences():
    "`(place, text)` of every string of the package, but for style sheets"
    lib = Path(t2v_turbo.__file__).parent
    for py in sorted(lib.rglob("*.py")):
        for n in ast.walk(ast.parse(py.read_text(encoding="utf-8"))):
            text = n.value if isinstance(n, ast.Constant) and isinstance(n.value, str) else ""
            if "--" in text and "var(--" not in text: yield f"{py.relative_to(lib)}:{n.lineno}", text


def test_options_that_an_error_recommends_exist():
    have, bad, seen = flags(), [], 0
    for place, text in sentences():
        named = set(re.findall(r"--[a-z][\w-]*", text))
        named |= {f"--{n}" for n in re.findall(r"\b(missing|verify|mix|check|variant|dtype)=", text)}
        seen += len(named)
        bad += [(place, n) for n in named - have - FOREIGN]
    assert not bad and seen > 20


def test_every_setting_of_a_training_is_an_option():
    "And every option of `distill` is a field that something reads"
    have = flags()
    for cls in (Config, Objective, running.DistillOptions, SampleOptions, GenerateOptions, CacheOptions, PlanOptions):
        assert {f"--{f.name}" for f in fields(cls) if f.name not in ("objective", "kind", "out")} <= have
    lib = "".join(p.read_text() for p in Path(t2v_turbo.__file__).parent.rglob("*.py"))
    for cls in (Config, running.DistillOptions, SampleOptions, GenerateOptions, CacheOptions, PlanOptions):
        for f in fields(cls): assert re.search(rf"\b(cfg|self|c|o|extra|self\.cfg)\.{f.name}\b", lib), f"nothing reads {f.name}"


@pytest.mark.parametrize("make, given, sentence", [
    ("train:Config", dict(steps="3"), "steps is '3': give a whole number"), ("train:Config", dict(compile="no"), "compile is 'no': give a whole number"),
    ("train:Config", dict(lr="fast"), "lr is 'fast': give a number"), ("distill:Objective", dict(beta_img="1"), "beta_img is '1': give a number"),
    ("watch:WatchOptions", dict(patience=1.5), "patience is 1.5: give a whole number")])
def test_a_setting_of_another_type_is_one_sentence(make, given, sentence):
    import importlib
    module, name = make.split(":")
    with pytest.raises(UserError, match=re.escape(sentence)): getattr(importlib.import_module(f"t2v_turbo.{module}"), name)(**given)
