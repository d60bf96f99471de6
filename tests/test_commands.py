"The pages of the commands: one for each verb, of today, with every option and the text of `--help`"
import importlib.util
import json
from pathlib import Path

import pytest

from t2v_turbo.cli import VERBS, main
from t2v_turbo.options import options_of
from t2v_turbo.recipes import STARTS

ROOT = Path(__file__).resolve().parents[1]


def tool(name):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


commands, docs = tool("commands"), tool("docs")


def cells(verb): return json.loads((commands.PAGES / f"{commands.page_of(verb)}.ipynb").read_text(encoding="utf-8"))["cells"]


def text(verb): return "\n".join("".join(c["source"]) for c in cells(verb))


def test_pages_are_of_today_and_each_verb_has_one(tmp_path, monkeypatch):
    commands.main(["--check"])
    assert {p.stem for p in commands.PAGES.glob("*.ipynb")} == {"overview", *(commands.page_of(v.name) for v in VERBS)}
    monkeypatch.setattr(commands, "PAGES", tmp_path)
    with pytest.raises(SystemExit, match="nbs/commands/overview.ipynb"): commands.main(["--check"])
    (tmp_path / "fly.ipynb").write_text("{}")
    commands.main([])
    commands.main(["--check"])
    assert not (tmp_path / "fly.ipynb").exists()                                        # no page of a verb that is gone
    (tmp_path / "plan.ipynb").write_text((tmp_path / "plan.ipynb").read_text().replace("--tflops", "--flops"))
    with pytest.raises(SystemExit, match="nbs/commands/plan.ipynb: not of today"): commands.main(["--check"])


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v.name)
def test_a_page_has_every_option_and_the_help(verb, capsys, monkeypatch):
    page = text(verb.name)
    for o in (*options_of(verb), *(STARTS if verb.training else ())):
        row, = [l for l in page.splitlines() if l.startswith(f"| `{o.name}` |" if o.place else f"| `--{o.name}`")]
        assert commands.default(o) in row and all(f"`{c}`" in page for c in o.choices if c and not o.flag), row
    monkeypatch.setenv("COLUMNS", commands.COLUMNS)
    with pytest.raises(SystemExit) as e: main([*verb.name.split(), "--help"])
    assert e.value.code == 0
    assert "".join(cells(verb.name)[-1]["outputs"][0]["text"]) == capsys.readouterr().out


def test_groups_and_units():
    found = {v.name: v for v in VERBS}
    assert [t for t, _ in commands.grouped(found["distill"])][:2] == ["start from", "what to train on"]
    units = {o.name: commands.unit(o, v.name) for v in VERBS for o in options_of(v)}     # raises for a number whose unit is not listed
    assert (units["gpu"], units["height"], units["batch"], units["seed"], units["lr"]) == ("GB", "pixels", "clips", "", "")
    assert not commands.unit(next(o for o in options_of(found["rate make"]) if o.name == "repeats"), "rate make")


def test_a_command_in_a_sentence_is_linked():
    names = {"a": "commands/plan.html", "b": "commands/reward_check.html", "c": "tutorials/x.html", "d": "commands/overview.html"}
    linked = lambda s, page="tutorials/x.html": docs.command_links(s, page, names)
    assert linked("<p><code>t2v-turbo plan --gpu 16</code></p>") == '<p><a href="../commands/plan.html"><code>t2v-turbo plan --gpu 16</code></a></p>'
    assert 'href="reward_check.html"' in linked("<code>t2v-turbo reward check</code>", "commands/plan.html")
    for stays in ("<pre><code>t2v-turbo plan</code></pre>", "<h2><code>t2v-turbo plan</code></h2>", "<code>t2v-turbo planet</code>", '<a href="x"><code>t2v-turbo plan</code></a>'):
        assert linked(stays) == stays
    assert linked("<code>t2v-turbo plan</code>", "commands/plan.html") == "<code>t2v-turbo plan</code>"
