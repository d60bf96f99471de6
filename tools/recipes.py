"""The page of the recipes, from the table of recipes and the predictor of memory

`python tools/recipes.py` writes nbs/tutorials/recipes.ipynb out of the table and of nbs/tutorials/recipes.json. `--predict` first predicts the memory of
the recipes whose settings have changed since, half a minute each on an idle core. `--check` writes nothing, and exits with 1 if the page would change.
"""
import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from t2v_turbo.files import write_json
from t2v_turbo.recipes import GPUS, PAPER, RECIPES, recipe_table, setup_of
from t2v_turbo.teachers.folders import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
PAGE, HELD = ROOT / "nbs/tutorials/recipes.ipynb", ROOT / "nbs/tutorials/recipes.json"
RESERVE = 1.5                           # GB of `plan.RESERVE`, which would import PyTorch; a test compares them
FLOAT = "; the student computes in float32, unless `accelerate launch --mixed_precision bf16` casts it"
SPEED = .35                             # of a card's data sheet: an assumption, see the page

TEACHERS = {                            # name: title, kind of its defaults, data, row of the paper
    "modelscope": ("ModelScopeT2V, 256x256, 16 frames", "modelscope", "80.62 / 82.15 / 74.47"),
    "videocrafter2": ("VideoCrafter2, 320x512, 16 frames", "videocrafter2", "81.01 / 82.57 / 74.76"),
    "wan": ("Wan 2.1 1.3B, 480x832, 81 frames", "wan", ""),
    "wan2.2": ("Wan 2.2 TI2V-5B, 704x1280, 121 frames", "wan", ""),
    "sana": ("SANA-Video 2B, 480x832, 81 frames", "wan", ""),
}
VIDEO = dict(modelscope="ViCLIP", videocrafter2="InternVideo2")
BEFORE = {
    "modelscope": "The teacher is fetched from the hub by the recipe itself. Its weights are CC-BY-NC-4.0, and so is a student.",
    "videocrafter2": "The teacher is converted once: `t2v-turbo convert videocrafter2 model.ckpt videocrafter2 --vocabulary open_clip_torch-*.whl` "
                     "([the real teachers](real_teachers.ipynb) has the downloads).",
    "wan": "The teacher is fetched from the hub by the recipe itself. Its text encoder is four times as large as its transformer, so both caches come first, "
           "or `--data prompts.txt`, which makes them.",
    "wan2.2": "The teacher is fetched from the hub by the recipe itself, 34 GB. Both caches come first, or `--data prompts.txt`, which makes them.",
    "sana": "The teacher is fetched from the hub by the recipe itself; its text encoder is Gemma 2, under Gemma's terms ¿. Both caches come first, or `--data prompts.txt`, "
            "which makes them. A student can be exported as nothing but our own folder: SANA-Video's network takes the guidance scale as an input.",
}
SMALLEST = {                            # why no smaller GPU has a recipe
    "wan": "There is no recipe for 16 or 24 GB: with both caches and everything recomputed a step still takes {total:.1f} GB, its peak in {highest}, and an 8-bit optimiser "
           "saves less than 1 GB of them. Fewer frames or a smaller size fit, and are another task than the teacher's.",
    "wan2.2": "There is no recipe for less than 80 GB: with both caches and everything recomputed a step still takes {total:.1f} GB, its peak in {highest}.",
    "sana": "There is no recipe for 16 or 24 GB: with both caches and everything recomputed a step still takes {total:.1f} GB, its peak in {highest}.",
}


def predicted(s):
    "Numbers of a `Plan`; both half precisions take the same bytes"
    import torch

    from t2v_turbo.fit import GB
    from t2v_turbo.plan import predict
    p = predict(replace(s, dtype=torch.bfloat16))
    return dict(total=round(p.total / GB, 2), always=round(sum(p.weights.values()) / GB, 2),
                peak=round(p.peak / GB, 2), highest=p.highest, tflop=round(sum(v["flops"] for v in p.phases.values()) / 1e12, 1))


def words(s): return {k: str(v) for k, v in asdict(s).items()}


def stale(held):
    "Names that were not predicted yet, or with other settings"
    names = [n for n in RECIPES if n != "tiny"]
    return [n for n in names if held.get(n, {}).get("setup") != words(setup_of(n))]


def of(kind): return [n for n in RECIPES if n.startswith(kind + "-")]


def seconds(name, held):
    "Of a step of all clips, by operations alone"
    r = RECIPES[name]
    return held[name]["tflop"] * r.settings["accumulate"] / (SPEED * GPUS[r.gpu].tflops)


def least(r): return "> " * (r.settings.get("rank") == 0)      # float32 is slower than the data sheet's half precision


def hours(s): return f"{s / 3600:.0f} hours" if s < 72 * 3600 else f"{s / 86400:.0f} days"


def overview(held):
    rows = ["| recipe | GPU | predicted, GB | of | s a step | 10,000 steps |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for n, r in RECIPES.items():
        if not r.gpu: continue
        g, s = GPUS[r.gpu], seconds(n, held)
        many = f"{r.processes} x " if r.processes > 1 else ""
        rows.append(f"| [`{n}`](#{n}) | {many}{r.gpu} GB ({g.name}) | {held[n]['total']:.1f} | {g.memory - RESERVE:.1f} | {least(r)}{s:.0f} | {least(r)}{hours(s * r.settings['steps'])} |")
    return "\n".join(rows)


def command(name):
    launch = f"accelerate launch --num_processes {RECIPES[name].processes} -m t2v_turbo.cli" if RECIPES[name].processes > 1 else "t2v-turbo"
    return f"{launch} distill --recipe {name}{given(name)} --out runs/{name}"


def given(name, data="clips"):
    "Options that a recipe leaves to its user"
    s = RECIPES[name].settings
    words = "" if "vocabulary" in s else " --vocabulary open_clip_torch-*.whl"
    return (f" --data {data}" if data != "clips" or "data" not in s else "") + words


def caches(name):
    "Commands that make the caches of a recipe out of videos"
    s = RECIPES[name].settings
    if "data" not in s: return ""
    size = "".join(f" --{k} {s[k]}" for k in ("frames", "height", "width", "fps") if k in s)
    return (f"t2v-turbo cache latents {s['data']} --teacher {s['teacher']} --data clips{size}\n"
            f"t2v-turbo cache text {s['texts']} --teacher {s['teacher']} --data clips{size}\n")


def section(name, held):
    r, h = RECIPES[name], held[name]
    g, s = GPUS[r.gpu], seconds(name, held)
    prompts = f"`t2v-turbo distill --recipe {name}{given(name, 'prompts.txt')} --out runs/{name}`"
    return f"""### {name}

{r.about[0].upper() + r.about[1:]}.

```sh
{caches(name)}{command(name)}
```

Data: a folder, a table or tars of videos with captions, of any size and length that holds a clip; without any, {prompts} ([from prompts](from_prompts.ipynb)).

| predicted | |
| --- | --- |
| memory | {h['total']:.1f} GB at its peak ({h['highest']}), {h['always']:.1f} GB of them always; {g.memory:g} are reported by a card of type {g.name}, {RESERVE:g} stay free |
| operations | {h['tflop']:.0f} TFLOP {'a step on each GPU' if r.processes > 1 else f"for each of {r.settings['accumulate']} pieces of a step"} |
| time | {least(r)}{s:.0f} s a step, {least(r)}{hours(s * r.settings['steps'])} for {r.settings['steps']:,} steps, at {100 * SPEED:.0f} % of {g.tflops:g} TFLOPS{FLOAT if least(r) else ""} |
| backward recomputes | {r.settings.get('save_memory') or 'nothing'} |
| measured on a GPU | open |"""


def against(kind):
    _, defaults, vbench = TEACHERS[kind]
    d = DEFAULTS[defaults]
    ours = next(RECIPES[n].settings for n in of(kind))
    rows = [("", "paper", "recipe"),
            ("GPUs and clips a step", "8 x A100, one clip each", f"the GPU of the recipe; {PAPER['batch']} clips, in pieces"),
            ("steps, learning rate", "10,000; 1e-5, constant", f"{PAPER['steps']:,}; {ours.get('lr', d.lr):.0e}, {d.lr_schedule}".replace("e-0", "e-")),
            ("guidance scales", "[5, 15]", f"[{d.w_min:g}, {d.w_max:g}]"),
            ("solver skip", "k = 20", f"k = {d.k}"),
            ("image reward", "HPSv2.1, M = 6", f"{ours['reward'].split(',')[0]}, M = {PAPER['image_frames']}"),
            ("video reward", f"{VIDEO.get(kind, '')}, 8 frames", f"{ours['reward'].split(',')[1]}, {PAPER['video_frames']} frames"),
            ("weights of the rewards", "", f"{d.beta_img:g}, {d.beta_vid:g}"),
            ("LoRA", "", f"rank {d.rank}, dropout {PAPER['lora_dropout']:g}"),
            ("VBench, 4 steps: total / quality / semantic", vbench, "open"),
            ("time and memory", "not published", "predicted above; measured: open")]
    told = dict(modelscope=("2, 3", "rank 32 (`app_ms.py`); its training was not released"),
                videocrafter2=("1, 2", "rank 64, dropout 0.1 (code)")).get(kind, ("", ""))
    rows = [(a, dict(zip(("weights of the rewards", "LoRA"), told)).get(a, b), c) for a, b, c in rows]
    if kind in SMALLEST: rows = [(a, "" if a and a not in ("steps, learning rate", "solver skip") else b, c) for a, b, c in rows]
    lines = [f"| {' | '.join(r)} |" for r in rows]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


def teacher(kind, held):
    title = TEACHERS[kind][0]
    text = [f"## {title}\n\n{BEFORE[kind]}"]
    if kind in SMALLEST: text.append(SMALLEST[kind].format(**held[of(kind)[0]]))
    return "\n\n".join(text)


def compared(kind):
    words = {"modelscope": "Paper: T2V-Turbo (MS), appendix A and tables 1 and 4.", "videocrafter2": "Paper: T2V-Turbo (VC2), appendix A and tables 1 and 4.",
             "wan": "There is no published T2V-Turbo for Wan; the objective is the paper's, but for the range of guidance scales, which lies around Wan's own, 5.",
             "wan2.2": "There is no published T2V-Turbo for Wan; the objective is that of Wan 2.1 here.",
             "sana": "There is no published T2V-Turbo for SANA-Video; the objective is that of Wan 2.1 here. Its guidance scale enters through the network's own input."}
    return (f"### Ours against the paper: {TEACHERS[kind][0].split(',')[0]}\n\n{words[kind]} The published code spreads the losses over fixed processes, which weights "
            "them 1 : 1 : 2/3 for betas of 1 and 2; `--match_official` does the same on any number of GPUs.\n\n" + against(kind))


HEAD = """# Recipes by teacher and GPU

> One named run for each teacher and size of GPU: command, data, memory and time by `plan`, and the paper beside it"""
INTRO = """Each recipe is the paper's run on another GPU: the same batch, steps, rewards and frames, in pieces that fit. `t2v-turbo distill --recipe NAME` runs it, and every
option replaces one of its settings. `pip download --no-deps open_clip_torch` brings the wheel with CLIP's vocabulary, which is neither installed nor imported.
This page is written by `python tools/recipes.py` from the table in [notebook 91](../91_recipes.ipynb) and from `plan` ([notebook 68](../68_plan.ipynb)), which runs
the step at full size on a device without memory. Full fine-tuning (`full` in the name) trains every weight beside a frozen copy of the teacher.

**No recipe was run on a GPU.** Memory agrees with measurements on a CPU. Time is the number of operations, divided by 35 % of the product that the card's data
sheet gives for half precision: an assumption, which reading and decoding clips, small layers and old drivers make worse. Cells that need a GPU are marked open."""


BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/t2v-turbo/t2v_turbo/blob/main/nbs/"
         "tutorials/recipes.ipynb) · runs in ~1 s on a CPU")


def cells(held):
    yield HEAD
    yield INTRO + "\n\n" + BADGE + "\n\n" + overview(held)
    for kind in TEACHERS:
        yield teacher(kind, held)
        yield from (section(n, held) for n in of(kind))
        yield compared(kind)
    yield "## All settings\n\nWhat each name stands for, as `t2v-turbo recipes` prints it."
    yield ("## Summary\n\nChoose the row of your GPU, try it with `--steps 2 --out runs/try` first, and then for real. [Which GPU](choosing.ipynb) compares teachers and "
           "rewards; [from prompts](from_prompts.ipynb) needs no clips.")


def code(id, source, printed=""):
    out = [dict(name="stdout", output_type="stream", text=printed.splitlines(True))] if printed else []
    return dict(cell_type="code", execution_count=None, id=id, metadata={}, outputs=out, source=[source])


def page(held):
    "The notebook as text, clean as `nbdev_clean` leaves it"
    made = [dict(cell_type="markdown", id=f"recipe{i:02}", metadata={}, source=s.splitlines(True)) for i, s in enumerate(cells(held))]
    like = json.loads((ROOT / "nbs/tutorials/choosing.ipynb").read_text(encoding="utf-8"))
    made[2:2] = [like["cells"][2] | dict(id="recipe-install")]
    made[-1:-1] = [code("recipe-import", "from t2v_turbo.recipes import recipe_table"), code("recipe-table", "print(recipe_table())", recipe_table() + "\n")]
    nb = dict(cells=made, metadata=like["metadata"], nbformat=4, nbformat_minor=5)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--predict", action="store_true", help="predict what has changed")
    p.add_argument("--check", action="store_true", help="write nothing")
    a = p.parse_args(argv)
    held = json.loads(HELD.read_text(encoding="utf-8")) if HELD.exists() else {}
    for n in stale(held) if a.predict else ():
        mine = words(setup_of(n))
        like = [h for h in held.values() if h["setup"] | dict(dtype="") == mine | dict(dtype="")]
        held[n] = (like[0] if like else predicted(setup_of(n))) | dict(setup=mine)
        print(n, held[n]["total"], "GB", flush=True)
        write_json(HELD, {n: held[n] for n in RECIPES if n in held})
    if old := stale(held): sys.exit(f"{', '.join(old)} changed: run python tools/recipes.py --predict")
    text = page(held)
    if not a.check: PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text: sys.exit("nbs/tutorials/recipes.ipynb is not of today: run python tools/recipes.py")


if __name__ == "__main__": main()
