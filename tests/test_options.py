"One declaration per command: flags, choices, groups, nearest words, help without PyTorch, and shell completion"
import re
import subprocess
import sys

import pytest

from t2v_turbo import cli
from t2v_turbo.cli import VERBS, completion, main, read
from t2v_turbo.distill import Objective
from t2v_turbo.files import UserError, typed
from t2v_turbo.options import MISSING, Option, declared, located, objects_of, options_of, taken_from
from t2v_turbo.preparing import CacheOptions, ConvertLora, PlanOptions
from t2v_turbo.running import DistillOptions, read_config
from t2v_turbo.teachers.folders import DEFAULTS
from t2v_turbo.train import Config
from t2v_turbo.using import EvaluateOptions, GenerateOptions, SampleOptions

each = pytest.mark.parametrize("verb", VERBS, ids=lambda v: v.name)
by_name = {v.name: v for v in VERBS}


def refused(capsys, *words):
    "The one line on stderr of words that no command takes"
    with pytest.raises(SystemExit) as e: main(list(words))
    told = capsys.readouterr()
    assert e.value.code == 2 and not told.out and len(told.err.strip().splitlines()) == 1
    return told.err.strip()


def test_what_is_read_from_source_is_what_the_dataclass_has():
    "Names, defaults and types, without importing a module, agree with the class once it is imported"
    from dataclasses import fields, is_dataclass
    for where in {c for v in VERBS for c in v.classes}:
        cls, read_ = located(where), {o.name: o for o in declared(where)}
        own = {f.name: f for f in fields(cls) if not is_dataclass(f.type)}
        assert list(read_) == list(own)
        for n, f in own.items():
            assert read_[n].default == f.default and (read_[n].default is MISSING) == read_[n].place
            assert f.default in (MISSING, None) or isinstance(f.default, read_[n].kind)


@each
def test_every_name_of_a_declaration_exists(verb):
    assert callable(located(verb.function)) and (not verb.make or callable(located(verb.make)))
    names = {o.name for o in options_of(verb)}
    own = {o.name for c in verb.classes for o in declared(c)}
    for n in (*dict(verb.own), *verb.place): assert n in names
    assert set(verb.without) <= own and len(names) == len(options_of(verb))
    if verb.groups and verb.training:
        grouped = {n for _, g in verb.groups for n in g.split()}
        assert names <= grouped, f"in no group: {names - grouped}"


def test_no_group_names_an_option_that_is_gone():
    have = {o.name for v in VERBS for o in options_of(v)} | {"recipe", "config"}
    for groups in (cli.TRAINING, cli.GROUPS):
        named = [n for _, g in groups for n in g.split()]
        assert len(set(named)) == len(named) and set(named) <= have


@pytest.mark.parametrize("name, values", cli.CHOICES)
def test_listed_choices_are_those_that_a_setting_takes(name, values):
    make = lambda v: (objects_of(by_name["distill"], {name: v}))
    for v in values:
        try: make(v)
        except UserError as e: assert "that package is not here" in str(e)          # wandb, trackio
    with pytest.raises(UserError, match="give"): make("no such value")


@pytest.mark.parametrize("words", ["--compile", "--compile 1", "--compile=1", "--no-compile --compile"])
def test_flags_of_a_training(words):
    assert read_config(read(["distill", *words.split()])[1]).compile == 1
    assert objects_of(*read(["distill", "--scale_x0", "--match_official"]))[1] == DistillOptions(match_official=True)


@pytest.mark.parametrize("words", ["", "--no-compile", "--compile 0", "--compile=0", "--compile --no-compile"])
def test_flags_that_are_off(words):
    value = read_config(read(["distill", *words.split()])[1]).compile
    assert value == 0 and type(value) is int                                        # as checkpoints and tables note it


@pytest.mark.parametrize("words", ["--verify text out", "--verify 1 text out", "text --verify out", "text out --verify=1"])
def test_a_flag_swallows_no_positional_word(words):
    o, = objects_of(*read(["cache", *words.split()]))
    assert (o.kind, o.out, o.verify) == ("text", "out", True)


def test_flags_of_other_commands(tmp_path):
    assert objects_of(*read("vbench score --zero_missing x.json".split()))[0].zero_missing is True
    assert objects_of(*read("vbench score x.json --no-zero_missing".split()))[0].zero_missing is False
    o, = objects_of(*read("sample --offload --slicing 0 --w 0".split()))
    assert (o.offload, o.slicing, o.w) == (True, False, 0.)
    assert objects_of(*read(["vbench", "check"]))[0].file == "" and objects_of(*read(["vbench", "check", "t.csv"]))[0].file == "t.csv"
    o, = objects_of(*read("rate report a.csv b.csv --page p.html q.html --names x,y".split()))
    assert (list(o.files), list(o.page), o.names) == (["a.csv", "b.csv"], ["p.html", "q.html"], "x,y")


@pytest.mark.parametrize("words, says", [("distill --beta_image 1", "no option --beta_image; did you mean --beta_img?"), ("distill --save-memory all", "did you mean --save_memory?"),
                                         ("distill --no-compil", "did you mean --no-compile?"), ("distil", "no VERB 'distil': give one of distill, ablate"),
                                         ("distil", "did you mean distill?"), ("convert loar x y", "did you mean lora?"), ("distill --steps many", "--steps 'many': give a whole number"),
                                         ("distill --lr x", "--lr 'x': give a number"), ("distill --steps", "--steps: give a value"), ("distill --compile=yes", "--compile=yes: give --compile or --no-compile"),
                                         ("cache text", "required: out"), ("distill --xyzzy 1", "no option --xyzzy; see t2v-turbo distill --help"), ("distill 3", "unrecognized arguments: 3"),
                                         ("", "required: VERB"), ("rate", "required: VERB")])
def test_mistakes_on_the_command_line(capsys, words, says):
    assert says in refused(capsys, *words.split())


@each
def test_help_answers_within_a_second(verb):
    "CPU time of a fresh process, since other tests may run beside this one; no PyTorch"
    code = ("import sys, time; from t2v_turbo.cli import main\n"
            f"try: main({[*verb.name.split(), '--help']!r})\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
            "print(time.process_time())")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.splitlines()[-1]) < 1 and "usage: t2v-turbo " + verb.name in run.stdout


def test_help_stands_in_groups_with_choices_and_defaults(capsys):
    with pytest.raises(SystemExit): main(["distill", "--help"])
    out = capsys.readouterr().out
    titles = re.findall(r"^(\w[\w ]+):$", out, flags=re.M)
    assert titles == ["options", "start from", "what to train on", "objective", "optimisation", "memory", "judging", "files"]
    text = " ".join(out.split())
    assert "--shape {log_sigmoid,raw}" in text and "--compile, --no-compile torch.compile the denoiser (default: off)" in text
    assert f"(default: the teacher's; tiny {DEFAULTS['tiny'].w_max}, modelscope 15.0, videocrafter2 15.0, wan 6.0)" in text


@pytest.mark.parametrize("make, says", [(lambda: SampleOptions(steps="3"), "steps is '3': give a whole number"), (lambda: SampleOptions(w="x"), "w is 'x': give a number"),
                                        (lambda: SampleOptions(format="avi"), "format 'avi': give mp4 or gif"), (lambda: EvaluateOptions(repeats=None), "repeats is None: give a whole number"),
                                        (lambda: PlanOptions(gpu="24"), "gpu is '24': give a number"), (lambda: CacheOptions("text", 3), "out is 3: give text"),
                                        (lambda: CacheOptions("texts", "o"), "kind 'texts': give one of text, latents, samples, pairs"), (lambda: ConvertLora("a", "b", base="sd"), "base 'sd': give vc2 or ms"),
                                        (lambda: GenerateOptions(prompts="fetch", slicing="yes"), "slicing is 'yes': give True or False"), (lambda: DistillOptions(teacher_w=[1]), "teacher_w is .1.: give a number"),
                                        (lambda: typed(Objective(k=True)) or typed(Objective()) or typed(type("X", (), {})), None)])
def test_wrong_types_get_a_sentence(make, says):
    if says is None: return typed(Objective())
    with pytest.raises(UserError, match=says): make()


def test_right_types_pass(tmp_path):
    typed(Config()), typed(Objective(w_max=9)), SampleOptions(out=tmp_path, w=3, slicing=1, offload=0), DistillOptions(match_official=1)


def test_values_of_a_file_are_checked():
    assert taken_from(Option("w", float, None), None) is None and taken_from(Option("w", float, 1.), 3) == 3.
    with pytest.raises(UserError, match="shape 'x': give log_sigmoid or raw"): taken_from(Option("shape", str, "raw", "", ("log_sigmoid", "raw")), "x")
    with pytest.raises(UserError, match="steps is None: give a whole number"): taken_from(Option("steps", int, 4), None)


# --- completion ------------------------------------------------------------------------------------

def completed(*words):
    quoted = " ".join(f"'{w}'" for w in words)
    ask = f"{completion('bash')}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _t2v_turbo; echo \"${{COMPREPLY[*]}}\""
    run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert not run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("words, found", [(["dis"], ["distill"]), (["r"], ["report", "recipes", "rate", "reward"]), (["distill", "--comp"], ["--compile"]), (["distill", "--no-c"], ["--no-compile"]),
                                          (["distill", "--out", "x", "--shape", ""], ["log_sigmoid", "raw"]), (["distill", "--recipe", "videocrafter2-8"], ["videocrafter2-80gb", "videocrafter2-8x"]),
                                          (["ablate", "--see"], []), (["convert", ""], ["videocrafter2", "lora", "merged"]), (["convert", "lora", "--base", ""], ["vc2", "ms"]),
                                          (["cache", "la"], ["latents"]), (["distill", "--data", "x"], []), (["rate", "make", "--par"], ["--parts"])])
def test_completion(words, found):
    if words == ["ablate", "--see"]: found = ["--seeds"]
    assert completed("t2v-turbo", *words) == found


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_printed(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.strip() == completion(shell) and ("bashcompinit" in script) == (shell == "zsh")
    assert main(["completion", "fish"]) == 2 and "shell 'fish': give bash or zsh" in capsys.readouterr().err
