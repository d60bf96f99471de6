"""Every command that README and tutorials show, taken out of them: each has a class below, fits the options there are, and is run where a small machine can

A command stands in a fenced block, in a cell that runs it on the page, or in the text. One that is in no class fails, and so does a class
that nothing belongs to. Commands that follow each other are run in one folder, as they stand; what a small machine cannot do is replaced, as `SMALL`
says. `hf download` finds the published repositories, with small random weights, on a hub of the tests.
"""
import ast
import contextlib
import functools
import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import hub
import loras
import pytest
import torch

from t2v_turbo import cli, judges, watch
from t2v_turbo.core import make_gen, write_video
from t2v_turbo.judges import held_captions
from t2v_turbo.standins import tiny_videocrafter2
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.teachers.videocrafter2 import PREFIXES
from t2v_turbo.world import World

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "nbs/index.ipynb", *sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))]
PROGRAMS = r"(?:t2v-turbo|accelerate launch|torchrun|python3?(?:\.\d+)?|pip|hf|git|bash|vbench|pytest|for|do|done|\.)"


def text(s):
    return s if isinstance(s, str) else "".join(s)


def lines(block):
    "Commands of a block: continued lines are joined, comments go, `a && b` is two"
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        yield from filter(None, re.split(r"\s+&&\s+", line))


def of_markdown(md):
    "`(kind, command)` of fenced blocks and of the text"
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
    for lang, body in blocks.findall(md):
        if lang in ("sh", "bash", "console") or not lang and re.match(PROGRAMS + r"\s", body): yield from (("block", c) for c in lines(body))
    for c in re.findall(r"`([^`]+)`", blocks.sub("", md)):
        if re.match(PROGRAMS + r"\s+[\w-]", c): yield "text", " ".join(c.split())


def words_of(node):
    "Arguments of a call as one command; None for what is computed on the page"
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "split": return words_of(node.func.value)
    if isinstance(node, ast.List) and all(isinstance(e, ast.Constant) for e in node.elts): return shlex.join(e.value for e in node.elts)


def of_code(src):
    "`(kind, command)` of a cell: `!command`, `shell(..)` and `main(..)` that run it, `told(..)` that shows what it refuses"
    for line in re.findall(r"^\s*!\s*(.+)", src, flags=re.M): yield "block", line
    if src.lstrip().startswith("%%bash"): yield from (("block", c) for c in lines(src.split("\n", 1)[1]))
    if re.search(r"^\s*[!%]", src, flags=re.M): return
    for n in ast.walk(ast.parse(src)):
        name = getattr(getattr(n, "func", None), "id", "")
        if name not in ("shell", "main", "told") or not n.args: continue
        words = words_of(n.args[0]) if len(n.args) == 1 else words_of(ast.List(elts=n.args))
        if words is None and isinstance(n.args[0], (ast.Name, ast.Starred, ast.Call)): continue                  # inside `def shell`
        assert words, f"a command is put together on the page, so nobody can paste it: {ast.unparse(n)}"
        yield ("told" if name == "told" else "cell"), words if words.split()[0] in ("t2v-turbo", "accelerate") else f"t2v-turbo {words}"


def shown():
    "`(page, kind, command)` of everything"
    for page in PAGES:
        for c in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            found = of_markdown(text(c["source"])) if c["cell_type"] == "markdown" else of_code(text(c["source"]))
            yield from ((page.stem, kind, command) for kind, command in found)


COMMANDS = list(dict.fromkeys(shown()))
# Classes, by the first pattern that fits. "ours": checked against the options there are. Every other class says why a test does not run it.
CLASSES = {
    r"(accelerate launch|torchrun) .*t2v_turbo\.cli": "ours",
    r"accelerate launch --mixed_precision bf16$": "a flag of accelerate, named in a sentence",
    r"t2v-turbo ": "ours",
    r"hf download ": "hub",
    r"git clone |cd t2v_turbo$": "a copy of the repository stands for it, in tools/newcomer.py",
    r"pip install (\.|\. -c tests/colab-[\d-]+\.txt|-e \.\[dev\]|-e \"\.\[dev\]\"|t2v_turbo|git\+\S+)$": "tools/newcomer.py, tools/colab.py and tools/environments.py install",
    r"pip install bitsandbytes|pip uninstall (-y )?(torchvision|torchao)": "changes the environment",
    r"pip download --no-deps open_clip_torch": "the fixture clip_vocabulary does it",
    r"pytest( --full)?$": "is this suite",
    r"python3\.10 -m venv vbench-env|\. vbench-env|pip install (\"setuptools|torch torchvision|--no-build)|for d in|do vbench|vbench ": "VBench has an environment of its own",
    r"python tools/(newcomer|environments|recipes)\.py|python bench/": "takes minutes to hours; the tests of tools and bench run them in small",
}


def class_of(command):
    return next((p for p in CLASSES if re.match(p, command)), None)


def test_every_command_has_a_class():
    lost = [c for c in COMMANDS if not class_of(c[2])]
    assert not lost, "\n".join(map(str, lost))
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("pattern", CLASSES)
def test_every_class_has_a_command(pattern):
    assert any(class_of(c) == pattern for *_, c in COMMANDS)


def arguments(command):
    "Words behind `t2v-turbo`, whichever launcher stands before it"
    words = shlex.split(re.sub(r"\s\.\.$", "", command))
    return words[words.index("t2v_turbo.cli") + 1:] if "t2v_turbo.cli" in words else words[1:]


parser = functools.cache(cli.parser)


ours = [c for c in COMMANDS if CLASSES.get(class_of(c[2])) == "ours" and c[1] != "told"]


@pytest.mark.parametrize("page, kind, command", ours, ids=[f"{p}-{i}" for i, (p, *_) in enumerate(ours)])
def test_the_options_of_a_command_exist(page, kind, command):
    "Also those in the text, where some are only a verb or the half of a command"
    words = arguments(command)
    if not words: return                                               # `accelerate launch -m t2v_turbo.cli`: what follows is said in words
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try: parser().parse_args(words)
        except SystemExit as e: assert not e.code or kind == "text" and "required" in err.getvalue(), f"{page}: {command}\n{err.getvalue()[-500:]}"


# --- run -----------------------------------------------------------------------------------------

def changed(words, options):
    "A command with other options; an empty one goes"
    words = list(words)
    for name, value in options.items():
        at = words.index(f"--{name}") if f"--{name}" in words else len(words)
        words[at:at + 2] = [f"--{name}", str(value)] if str(value) or name == "track" else []
    return words


def paste(command, folder, env=(), **options):
    "Run a command in a folder, as a shell would; one of ours without a launcher in this process, which is quicker"
    words = shlex.split(command)
    words = [f for w in words for f in ([p.name for p in sorted(folder.glob(w))] if w.endswith("*.whl") else [w])]
    words = changed(words, options)
    if words[0] == "t2v-turbo":
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli.main(words[1:]) == 0, f"{command}\n{err.getvalue()[-3000:]}"
        return
    if words[:2] == ["accelerate", "launch"]: words[:2] = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    if words[0] == "hf": words[0] = str(Path(sys.executable).with_name("hf"))
    if words[0] == "torchrun": words[:1] = [sys.executable, "-m", "torch.distributed.run", "--master_port", "0"]
    run = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500,
                         env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | dict(env))
    assert run.returncode == 0, f"{command}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}"


def on(page, start, kinds=("block", "cell")):
    "The one command of a page that starts so"
    found = [c for p, k, c in COMMANDS if p == page and k in kinds and (c.startswith(start + " ") or c == start)]
    assert len(found) == 1, f"{page} has {len(found)} commands that start with {start!r}"
    return found[0]


# What a small machine replaces. The rewards of the paper exist at full size only; everything else is a smaller number.
SMALL = dict(steps=2, batch=2, rank=2, repeats=1, track="")
REAL = dict(steps=1, batch=2, accumulate="", reward="tiny-image,tiny-video", vocabulary="", dtype="float32", save_memory="")


def clips(folder, frames=33):
    "Four clips with captions"
    videos, captions = World("train", 0, frames, 32).batch(0, 4)
    for i, (clip, caption) in enumerate(zip(videos, captions)):
        write_video(folder / f"{i}.mp4", clip, 8)
        (folder / f"{i}.txt").write_text(caption)


def vocabulary(path):
    "A wheel that holds a vocabulary, in the place of open_clip_torch's"
    with zipfile.ZipFile(path, "w") as z:
        words = "#version\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n"
        z.writestr("open_clip/bpe_simple_vocab_16e6.txt.gz", gzip.compress(words.encode()))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The repositories of tests/hub.py, and what the tutorials fetch besides"
    tmp = tmp_path_factory.mktemp("published")
    folder = hub.repositories(tmp / "repos")
    state = tiny_videocrafter2()
    net = {k.removeprefix(PREFIXES["unet"]): v for k, v in state.items() if k.startswith(PREFIXES["unet"])}
    unet = tmp / "vc2"
    vocabulary(tmp / "words.whl")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(f"convert videocrafter2 {folder}/VideoCrafter/VideoCrafter2/model.ckpt {unet} --fps 16 --vocabulary {tmp}/words.whl".split()) == 0
    merged = net | {"time_cond_proj.weight": .1*torch.randn(32, 256, generator=make_gen(2))}
    for name, what in {"T2V-Turbo-VC2/unet_lora.pt": hub.lora_list(unet, "vc2"), "T2V-Turbo-VC2-Merged/t2v_turbo_vc2.pt": merged,
                       "T2V-Turbo-v2-no-MG/unet_no_mg.pt": merged}.items():
        (folder / "jiachenli-ucsb" / name).parent.mkdir(parents=True)
        torch.save(what, folder / "jiachenli-ucsb" / name)
    for name in ("OpenGVLab/InternVideo2-Stage2_1B-224p-f4/InternVideo2-stage2_1b-224p-f4.pt",
                 *(f"google-bert/bert-large-uncased/{n}" for n in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")                           # only fetched: the tiny rewards take their places
    return folder


def smaller(folder):
    "320x512 takes too long here"
    about = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps(about | dict(size=[16, 16])))


def report_of(folder):
    "A run that went to its end"
    assert (folder / "report.html").is_file() and (folder / "student/student.json").is_file()


def test_the_main_job(tmp_path, monkeypatch):
    "Alone, and behind the README's launcher on two processes: only its length, its judging and the number of processes differ from the page"
    for m in (judges, watch): monkeypatch.setattr(m, "held_captions", lambda n=4: held_captions(4))
    paste(on("distil_tiny", "t2v-turbo distill --out"), tmp_path, **SMALL)
    report_of(tmp_path / "runs/turbo")
    launcher = on("index", "accelerate launch", ["text"]).replace("--num_processes 8", "--num_processes 2")
    paste(launcher, tmp_path, **SMALL | dict(out="runs/two"))
    report_of(tmp_path / "runs/two")


def download(page, folder, published):
    "All that a page fetches, by its own lines, with an empty cache"
    fetched = [c for p, k, c in COMMANDS if p == page and c.startswith("hf download ")]
    assert fetched
    with hub.serve(published) as server:
        for c in fetched: paste(c, folder, hub.environment(server, folder / "cache", HF_HUB_OFFLINE="0"))
    vocabulary(folder / "open_clip_torch-0-py3-none-any.whl")


def run_page(page, folder, starts, without=(), **options):
    "Commands of a page in their order; each with the options that it has and that a small machine replaces"
    for c in [c for p, k, c in COMMANDS if p == page and k == "cell" and c.startswith(starts) and not any(w in c for w in without)]:
        has = set(re.findall(r"--(\w+)", c))
        mine = {k: v for k, v in (options | (dict(track="") if " distill " in c else {})).items() if k in has or k == "track"}
        paste(c.replace("--num_processes 8", "--num_processes 2"), folder, **mine)


def test_modelscope_on_one_gpu(tmp_path, published):
    download("modelscope_one_gpu", tmp_path, published)
    (tmp_path / "prompts.txt").write_text("a panda dances\na red car in the rain\nwaves at dusk\na cat looks up\n")
    run_page("modelscope_one_gpu", tmp_path, "t2v-turbo cache", samples=4, steps=2)
    run_page("modelscope_one_gpu", tmp_path, ("t2v-turbo distill", "t2v-turbo sample --student"), **REAL | dict(accumulate=2))
    assert (tmp_path / "runs/ms/student/student.json").is_file() and len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_my_own_model(tmp_path, published):
    "At most eight commands from an empty folder and an empty cache to a running distillation; the model, and a LoRA that stands for mine"
    page, mine = "my_own_model", [c for p, k, c in COMMANDS if p == "my_own_model" and k in ("block", "cell")]
    running = [i for i, c in enumerate(mine) if c.startswith("t2v-turbo distill")]
    assert len(running) == 1 and running[0] < 8, mine
    download(page, tmp_path, published)
    (tmp_path / "prompts.txt").write_text("a panda dances\na red car in the rain\nwaves at dusk\na cat looks up\n")
    net = load_teacher(tmp_path / "wan").denoiser
    loras.write(loras.random_lora(net, loras.in_blocks(net)), "kohya", tmp_path, net)[0].rename(tmp_path / "my-style.safetensors")
    small = dict(frames=17, height=32, width=32)
    run_page(page, tmp_path, "t2v-turbo cache", samples=4, steps=2, **small)
    paste(on(page, "t2v-turbo distill"), tmp_path, **SMALL | REAL | small | dict(accumulate=2))
    run_page(page, tmp_path, ("t2v-turbo sample", "t2v-turbo export"), dtype="float32")
    about = json.loads((tmp_path / "runs/mine/student/student.json").read_text())
    assert about["options"]["teacher_lora"].endswith("my-style.safetensors=0.8") and len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    assert (tmp_path / "mine-4-steps/transformer").is_dir()
    assert {f.name for n in ("lora", "comfyui") for f in (tmp_path / f"mine-{n}").iterdir()} == {"README.md",
        "about.json", "scheduler", "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"}
def test_from_prompts_alone(tmp_path, published):
    "The recipe's own teacher, fetched by the command from an empty cache"
    (tmp_path / "prompts.txt").write_text("a panda dances\nwaves at dusk\n")
    vocabulary(tmp_path / "open_clip_torch-0-py3-none-any.whl")
    small = {k: v for k, v in REAL.items() if k != "save_memory"} | dict(accumulate=2, teacher_steps=2, track="")
    first = next(c for p, k, c in COMMANDS if p == "from_prompts" and k == "cell" and " distill " in c)
    with hub.serve(published) as server:
        env = hub.environment(server, tmp_path / "cache", HF_HUB_OFFLINE="0")
        python = f"{shlex.quote(sys.executable)} -m t2v_turbo.cli"
        paste(first.replace("t2v-turbo", python, 1), tmp_path, env, **small)
        assert any("unet" in f for f in server.fetched())
        paste(on("from_prompts", "t2v-turbo sample").replace("t2v-turbo", python, 1), tmp_path, env, dtype="float32")
    assert (tmp_path / "runs/ms/student/student.json").is_file() and len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    assert json.loads((tmp_path / "runs/ms/latents/cache.json").read_text())["kind"] == "samples"


def test_videocrafter2_on_two_processes(tmp_path, published):
    page = "videocrafter2_eight_gpus"
    download(page, tmp_path, published)
    clips(tmp_path / "clips")
    run_page(page, tmp_path, "t2v-turbo convert")
    smaller(tmp_path / "videocrafter2")
    run_page(page, tmp_path, "accelerate launch", **REAL)
    run_page(page, tmp_path, "t2v-turbo sample", dtype="float32")
    assert (tmp_path / "runs/vc2/student/student.json").is_file() and len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    (tmp_path / "VBench_full_info.json").write_text(json.dumps([dict(prompt_en="a panda dances", dimension=["color"])]))
    paste(on("evaluate_vbench", "t2v-turbo generate", ["block"]), tmp_path)
    assert len(list((tmp_path / "vbench/mine/videos").iterdir())) == 5


def test_the_real_teachers(tmp_path, published):
    page = "real_teachers"
    download(page, tmp_path, published)
    clips(tmp_path / "clips")
    run_page(page, tmp_path, "t2v-turbo convert videocrafter2")
    smaller(tmp_path / "videocrafter2")
    run_page(page, tmp_path, "t2v-turbo convert lora"), run_page(page, tmp_path, "t2v-turbo convert merged")
    newer = "Wan2.2", "SANA"                       # at their full size, which no option of the commands makes small: the page itself runs them
    run_page(page, tmp_path, "t2v-turbo distill", newer, **REAL | dict(frames=33, height=32, width=32))
    run_page(page, tmp_path, "t2v-turbo sample", newer, dtype="float32")
    assert len(list((tmp_path / "videos").iterdir())) == 7
