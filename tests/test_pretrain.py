"The trainings behind `t2v-turbo pretrain`: killed anywhere and started again, they end with the same bits."
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from t2v_turbo import pretrain as p
from t2v_turbo.core import seeded
from t2v_turbo.files import UserError
from t2v_turbo.grading import NONE, Graded, disordered, graded, joined, look_grade, word_loss
from t2v_turbo.judges import Judge
from t2v_turbo.resumable import Training, cosine, plateau, read_log
from t2v_turbo.rewards.tiny import CLASSES
from t2v_turbo.teachers.networks import PatchVAE, TinyVideoDenoiser
from t2v_turbo.world import World

SHORT = replace(p.Recipe(batch=8, looks=8).scaled(.0001), known=16, vae=3, teacher=9, frames=3, pool=8, graded=8, predicted=8)


class Killed(BaseException):
    "Stands in for SIGKILL: nothing in the library catches it"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "A small denoiser, and a checkpoint after every step"
    monkeypatch.setattr(p, "TinyVideoDenoiser", lambda: TinyVideoDenoiser(width=24, num_layers=1, num_heads=2, hidden=24, cond=8, mending=8))
    monkeypatch.setattr(Training, "every", -1.)


def stop_at(monkeypatch, owner, name, call):
    "Kill the process that makes this call of a function, once"
    whole, seen = getattr(owner, name), []

    def counted(*args, **more):
        seen.append(0)
        if len(seen) == call: raise Killed
        return whole(*args, **more)
    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def vae():
    with seeded(0): vae = PatchVAE()
    p.set_statistics(vae, 0, 8, 8)
    return vae.requires_grad_(False).eval()


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_autoencoder_killed_and_resumed(tmp_path, monkeypatch):
    whole = p.train_vae(tmp_path / "a", SHORT)
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_at(m, p, "vae_loss", 3)
        p.train_vae(tmp_path / "b", SHORT)
    assert torch.load(tmp_path / "b/last.pt", weights_only=True)["step"] == 2
    resumed = p.train_vae(tmp_path / "b", SHORT)
    same(whole.state_dict(), resumed.state_dict())
    assert resumed.config.latents_std == whole.config.latents_std
    assert all(torch.equal(v, v.half().float()) for v in whole.state_dict().values())


def test_teacher_killed_in_a_step_and_in_its_pool(tmp_path, monkeypatch, vae):
    "Muon, AdamW, averages, words and the pool on disk"
    whole = p.train_teacher(vae, tmp_path / "a", SHORT)
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_at(m, p, "teacher_loss", 5)
        p.train_teacher(vae, tmp_path / "b", SHORT)
    with monkeypatch.context() as m, pytest.raises(Killed):          # new latents are written, but do not count yet
        stop_at(m, p, "atomic", 1)
        p.train_teacher(vae, tmp_path / "b", SHORT)
    assert (tmp_path / "b/pool/count.txt").read_text() == "8"
    resumed = p.train_teacher(vae, tmp_path / "b", SHORT)
    same(whole.state_dict(), resumed.state_dict())
    assert (tmp_path / "a/pool/z.npy").read_bytes() == (tmp_path / "b/pool/z.npy").read_bytes()
    with seeded(20): start = p.TinyVideoDenoiser().state_dict()
    moved = {k for k, v in whole.denoiser.state_dict().items() if not torch.equal(v, start[k])}
    assert {"blocks.0.qkv.weight", "blocks.0.modulate.weight", "patch_out.weight"} <= moved


def test_the_pool_depends_on_seed_and_number_alone(tmp_path, vae):
    teacher, _ = p._teacher(vae, 0)
    one, two = (p.LatentPool(teacher, tmp_path / k, 5, 16, 8) for k in "ab")
    one.grow(8); one.grow(16); two.grow(16)
    assert (one.z == two.z).all() and (one.ids == two.ids).all() and one.n == two.n == 16
    again = p.LatentPool(teacher, tmp_path / "a", 5, 16, 8)
    assert again.n == 16 and (again.z == one.z).all()
    video, captions = World("train", 5).batch(1, 8)
    assert torch.equal(torch.from_numpy(one.ids[8:]), p.tokenize(teacher.tokenizer, captions))
    torch.testing.assert_close(torch.from_numpy(one.z[8:]).float(), teacher.encode(video), atol=.1, rtol=.1)   # bfloat16
    z, _ = two.draw(50, 8, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(x, torch.from_numpy(y).float()) for y in two.z[:8]) for x in z)


@pytest.fixture(scope="module")
def pool(vae):
    teacher, _ = p._teacher(vae, 0)
    g = graded(teacher.requires_grad_(False), 1, 0, 8, "train")
    g.video = (g.video * 255).round().to(torch.uint8)
    return g


@pytest.mark.parametrize("name", p.RATERS)
def test_rater_killed_and_resumed(tmp_path, monkeypatch, pool, name):
    short = replace(SHORT, **{name: 3})
    whole = p.train_rater(name, pool, tmp_path / "a", short)
    with monkeypatch.context() as m, pytest.raises(Killed):
        stop_at(m, p, "rater_loss", 2)
        p.train_rater(name, pool, tmp_path / "b", short)
    same(whole.state_dict(), p.train_rater(name, pool, tmp_path / "b", short).state_dict())


def test_all_parts_killed_between_them(tmp_path, monkeypatch):
    "Finished parts are kept; pools go when they are done with; another recipe is refused"
    for owner, name in ((p, "train_teacher"), (p, "train_rater"), (p, "save_file")):
        with monkeypatch.context() as m, pytest.raises(Killed):
            stop_at(m, owner, name, 2 if name == "train_rater" else 1)
            p.pretrain(tmp_path / "a", 1., SHORT, "cpu")
    p.pretrain(tmp_path / "a", 1., SHORT, "cpu")
    found = {q.name for q in (tmp_path / "a").iterdir()}
    assert found == {"recipe.json", "work", "tiny", "tiny-flow", "judges.safetensors",
                     "tiny-image.safetensors", "tiny-video.safetensors", "tiny-tube.safetensors"}
    assert {q.name for q in (tmp_path / "a/work").iterdir()} == {"vae", "teacher", *p.RATERS}
    assert not (tmp_path / "a/work/teacher/pool").exists()
    net = Judge(); net.load_state_dict(load_file(tmp_path / "a/judges.safetensors"))
    times = {q: q.stat().st_mtime_ns for q in (tmp_path / "a").rglob("*.safetensors")}
    p.pretrain(tmp_path / "a", 1., SHORT, "cpu")
    assert times == {q: q.stat().st_mtime_ns for q in (tmp_path / "a").rglob("*.safetensors")}
    with pytest.raises(UserError, match="another recipe .scale 1.0.: give that scale, or another folder"):
        p.pretrain(tmp_path / "a", .5)


def test_refused(tmp_path):
    for scale in (0., 1.5, float("nan")):
        with pytest.raises(UserError, match="give .0, 1."): p.pretrain(tmp_path / "w", scale)
    assert not (tmp_path / "w").exists()
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"): p.pretrain(tmp_path / "f/w", .1)


# --- the loop ------------------------------------------------------------------------------------

def test_a_log_is_cut_back_to_the_checkpoint(tmp_path):
    def training():
        net = nn.Linear(1, 1, bias=False); nn.init.ones_(net.weight)
        return Training(net, torch.optim.SGD(net.parameters(), .01), tmp_path)
    t = training()
    t.every = 1e9
    t.run(lambda i: t.net.weight.square().sum(), lambda i: 1., 120)
    rows = read_log(tmp_path / "loss.jsonl")
    assert [r["step"] for r in rows] == [50, 100] and len(t.losses) == 20
    with open(tmp_path / "loss.jsonl", "a") as f: f.write('{"step": 150, "loss": 1}\n{"step": 2')
    t = training()
    assert t.step == 120 and len(t.losses) == 20 and read_log(tmp_path / "loss.jsonl") == rows


def test_rates():
    assert [cosine(i, 100, 5) for i in (0, 99)] == pytest.approx([.2, 0.], abs=3e-4) and cosine(5, 100, 5) > .99
    assert [plateau(i, 100, 300, 20) for i in (0, 9, 50, 80, 90, 99)] == pytest.approx([.1, 1, 1, 1, .5, .05])
    assert cosine(0, 2, 200) == plateau(0, 2, 300, 2) == 1.


def test_recipe_is_scaled():
    tiny = p.Recipe().scaled(1e-6)
    assert (tiny.vae, tiny.teacher, tiny.pool, tiny.graded, tiny.batch) == (2, 2, 32, 32, 32)
    half = p.Recipe().scaled(.5)
    assert (half.teacher, half.frames, half.predicted, half.looks) == (8000, 2450, 768, 256)


# --- grades --------------------------------------------------------------------------------------

def test_grades_fall_with_every_fault():
    flaws, zero, some = torch.zeros(2, 3), torch.zeros(2), torch.tensor([.1, .3])
    assert look_grade(flaws, zero, zero).tolist() == [1, 1]
    for noise, ghost in ((some, zero), (zero, some)):
        a, b = look_grade(flaws, noise, ghost).tolist()
        assert 1 > a > b >= 0
    assert look_grade(flaws, zero, torch.ones(2)).tolist() == [0, 0]


def test_frozen_and_shuffled_clips_have_no_motion():
    clips = torch.arange(8.).view(1, 1, 8, 1, 1).expand(400, 3, 8, 2, 2)
    out, labels, ordered = disordered(clips, torch.zeros(400, 4, dtype=torch.long), torch.Generator().manual_seed(0))
    assert 20 < (~ordered).sum() < 80 and torch.equal(labels[:, 3] == NONE, ~ordered)
    assert torch.equal(out[ordered], clips[ordered])
    span = out[~ordered][:, 0, :, 0, 0]
    frozen = span.amax(1) == span.amin(1)
    assert 5 < frozen.sum() < len(frozen) - 5
    assert (span[~frozen].sort(1).values == torch.arange(8.)).all()


def test_hidden_words_cost_less_when_unsure():
    labels = torch.zeros(2, 4, dtype=torch.long)
    make = lambda h: Graded(torch.zeros(2, 1), labels, torch.full((2,), h), torch.ones(2), torch.ones(2))
    flat = torch.zeros(2, CLASSES[0])
    sure = flat.clone(); sure[:, 0] = 10.
    for h, better in ((0., sure), (.9, flat)):
        assert torch.equal(min((sure, flat), key=lambda x: word_loss((x,), make(h), (0,)).item()), better)
    both = joined([make(0.), make(.5)])
    assert both.hidden.tolist() == [0, 0, .5, .5] and both.rows(torch.tensor([3])).hidden.tolist() == [.5]


def test_the_recipe_of_a_folder_is_written(tmp_path):
    p._one_recipe(tmp_path, SHORT, 1.)
    assert json.loads((tmp_path / "recipe.json").read_text())["teacher"] == 9
