"""The pages of the commands, from the declarations that the command line is built from

`python tools/commands.py` writes nbs/commands/VERB.ipynb for every verb and nbs/commands/overview.ipynb. `--check` writes nothing, and exits with 1 if a page would change.
"""
import argparse
import json
import os
import re
import sys
from dataclasses import MISSING
from pathlib import Path

from t2v_turbo.cli import PARENTS, VERBS, parser
from t2v_turbo.options import help_of, options_of
from t2v_turbo.recipes import STARTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "nbs/commands"
COLUMNS = "96"                          # of the help, on these pages and in their cells
UNITS = dict(frames="frames", height="pixels", width="pixels", fps="frames a second", image_frames="frames", video_frames="frames", window="frames",
             batch="clips", clips="clips", clips_each="clips", accumulate="pieces", mix="tars", workers="threads", samples="samples", at_once="samples",
             steps="steps", teacher_steps="steps", teacher_look="steps", student_steps="steps", warmup="steps", critic_steps="updates", judge_every="steps", judge_steps="updates", save_every="steps", keep_every="steps", eval_every="steps",
             max_skipped="steps", k="timesteps", origin="timesteps", keep="checkpoints", patience="looks", jobs="students", parts="pages", repeats="clips",
             gpu="GB", view="seconds", min_seconds="seconds", tflops="TFLOPS", tol="percent points")
OTHER = {"rate make": dict(repeats="")}                               # units that differ for a command
LONG = 80                               # letters of a list of values that fits in a table
PURE = "seed rank lr lora_dropout ema clip w w_min w_max teacher_w student_w huber_c beta_img beta_vid lambda_score critic_lr judge_lr scale".split() # numbers without a unit
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/t2v-turbo/t2v_turbo/blob/main/nbs/"
         "commands/{}.ipynb) · runs in ~1 s on a CPU")


def page_of(verb):
    "File name of a verb's page, without its ending"
    return verb.replace(" ", "_")


def notebooks():
    "Modules by name: the notebook that exports each"
    found = {}
    for p in sorted((ROOT / "nbs").glob("*.ipynb")):
        m = re.search(r"default_exp (\S+?)\\?\"", p.read_text(encoding="utf-8"))
        if m: found[m[1]] = p.name
    return found


def unit(o, verb=""):
    "Unit of a number; empty for a pure number, and for what is none"
    if o.kind not in (int, float) or o.flag or o.choices or o.name in PURE: return ""
    return (UNITS | OTHER.get(verb, {}))[o.name]


def listed(o):
    return ", ".join(f"`{c}`" for c in o.choices if c != "")


def values(o):
    "What an option takes"
    if o.flag: return "on or off"
    if o.choices: return listed(o) if len(listed(o)) < LONG else "a name, see below"
    many = ", several" if o.kind is tuple else ""
    return {str: "text", tuple: "text", int: "whole number", float: "number"}[o.kind] + many


def default(o):
    "Its default, as the help prints it"
    told = re.fullmatch(r".*\(default: (.*)\)", help_of(o), flags=re.S)
    return "required" if o.default is MISSING else told[1]


def row(o, verb):
    "Line of the table of options"
    name = f"`{o.name}`" if o.place else f"`--{o.name}`" + (f", `--no-{o.name}`" if o.flag else "")
    note = o.note.removeprefix("1: ") if o.flag else o.note
    cells = name, note, values(o), default(o), unit(o, verb)
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", c).replace("\n", " ").replace("*", r"\*").replace("<", "&lt;") for c in cells) + " |"


def grouped(verb):
    "Pairs (title, options), in the order of the help"
    options = (*options_of(verb), *(STARTS if verb.training else ()))
    title = {n: t for t, names in verb.groups for n in names.split()}
    shelves = {"arguments": [o for o in options if o.place], "options": []}
    shelves |= {t: [] for t, _ in verb.groups}
    for o in options:
        if not o.place: shelves[title.get(o.name, "options")].append(o)
    return [(t, found) for t, found in shelves.items() if found]


def table(title, options, verb):
    head = "| option | meaning | values | default | unit |\n| --- | --- | --- | --- | --- |"
    below = [f"`--{o.name}` takes {listed(o)}." for o in options if o.choices and len(listed(o)) >= LONG]
    return f"## {title[0].upper() + title[1:]}\n\n{head}\n" + "\n".join(row(o, verb) for o in options) + "".join(f"\n\n{b}" for b in below)


def parser_of_verb(verb):
    "The parser that reads a verb's words"
    at = parser()
    for word in verb.name.split(): at = next(a for a in at._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
    return at


def help_text(verb):
    "The text of `--help`"
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), COLUMNS
    try: return parser_of_verb(verb).format_help()
    finally:
        if before is None: del os.environ["COLUMNS"]
        else: os.environ["COLUMNS"] = before


def cells(verb, books):
    "Sources of a page; a pair is a code cell and what it prints"
    module = verb.function.partition(":")[0]
    yield f"# t2v-turbo {verb.name}\n\n> {verb.help[0].upper() + verb.help[1:]}"
    yield (f"Every option of `t2v-turbo {verb.name}`, as the command line declares it ([notebook {books[module][:2]}](../{books[module]})). Generated by `python tools/commands.py`.\n\n"
           f"[All commands](overview.ipynb)\n\n" + BADGE.format(page_of(verb.name)))
    yield from (table(t, o, verb.name) for t, o in grouped(verb))
    yield "## Help\n\nThe same text in a terminal."
    yield "import os\n\nfrom t2v_turbo.cli import main", ""
    words = ", ".join(f'"{w}"' for w in (*verb.name.split(), "--help"))
    yield f'os.environ["COLUMNS"] = "{COLUMNS}"\ntry: main([{words}])\nexcept SystemExit: pass', help_text(verb)


def overview(books):
    "Sources of the page of all verbs"
    yield "# Commands\n\n> Every command of `t2v-turbo`, a page for each with its options"
    rows = [f"| [`{v.name}`]({page_of(v.name)}.ipynb) | {v.help} |" for v in VERBS]
    parents = "\n".join(f"- `{p}`: {told}" for p, told in PARENTS.items())
    yield ("`t2v-turbo VERB --help` prints the same as these pages. The declarations are in [notebook 97](../97_cli.ipynb).\n\n".replace("79", books["cli"][:2]).replace(books["cli"][:2] + "_cli.ipynb", books["cli"])
           + "| command | purpose |\n| --- | --- |\n" + "\n".join(rows) + "\n\n" + BADGE.format("overview"))
    yield f"## Groups\n\nCommands of two words belong together:\n\n{parents}"
    yield "## Help\n\nThe same text in a terminal."
    yield "import os\n\nfrom t2v_turbo.cli import main", ""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), COLUMNS
    printed = parser().format_help()
    if before is None: del os.environ["COLUMNS"]
    else: os.environ["COLUMNS"] = before
    yield f'os.environ["COLUMNS"] = "{COLUMNS}"\ntry: main(["--help"])\nexcept SystemExit: pass', printed


def page(name, sources):
    "The notebook as text, clean as `nbdev_clean` leaves it"
    like = json.loads((ROOT / "nbs/tutorials/choosing.ipynb").read_text(encoding="utf-8"))
    made = []
    for i, s in enumerate(sources):
        about = dict(id=f"{name[:20].replace('_', '-')}-{i:02}", metadata={})
        if isinstance(s, str): made.append(about | dict(cell_type="markdown", source=s.splitlines(True))); continue
        out = [dict(name="stdout", output_type="stream", text=s[1].splitlines(True))] if s[1] else []
        made.append(about | dict(cell_type="code", execution_count=None, outputs=out, source=s[0].splitlines(True)))
    made[2:2] = [like["cells"][2] | dict(id=f"{name[:20].replace('_', '-')}-install")]
    nb = dict(cells=made, metadata=like["metadata"], nbformat=4, nbformat_minor=5)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def pages():
    "File names and texts of all pages"
    books = notebooks()
    found = {"overview": page("overview", overview(books))}
    return found | {n: page(n, cells(v, books)) for v in VERBS for n in [page_of(v.name)]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="write nothing")
    a = p.parse_args(argv)
    made, there = pages(), {f.stem: f for f in PAGES.glob("*.ipynb")}
    old = [n for n, text in made.items() if n not in there or there[n].read_text(encoding="utf-8") != text] + [n for n in there if n not in made]
    if a.check:
        if old: sys.exit(f"{', '.join(f'nbs/commands/{n}.ipynb' for n in old)}: not of today, run python tools/commands.py")
        return
    PAGES.mkdir(exist_ok=True)
    for n in there.keys() - made.keys(): there[n].unlink()
    for n, text in made.items(): (PAGES / f"{n}.ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
