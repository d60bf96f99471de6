"A cache and a run are of what their videos contain: replaced ones are noticed, lost ones do not end a run"
import json
import os
import shutil
import warnings

import pytest
import torch

from t2v_turbo.core import write_video
from t2v_turbo.data import build
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.cache import open_cache
from t2v_turbo.data.cache_files import shard_path, verify_cache
from t2v_turbo.data.clips import ClipFolder
from t2v_turbo.data.shards import Shards
from t2v_turbo.data.tars import write_shards
from t2v_turbo.files import UserError
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.train import Config, Trainer
from t2v_turbo.world import World

SMALL = dict(batch=2, shard=1, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def teacher(): return load_teacher("tiny")


@pytest.fixture(scope="module")
def clips():
    got = [World(clean=True).batch(i, 1) for i in range(8)]
    return [(x[0], c[0]) for x, c in got]


def fill(folder, clips):
    folder.mkdir()
    for i, (x, c) in enumerate(clips): write_video(folder / f"{i}.mp4", x, 8); (folder / f"{i}.txt").write_text(c)
    return folder


@pytest.fixture
def videos(tmp_path, clips): return fill(tmp_path / "v", clips[:5])


def says(sentence, f, *args, **kw):
    with pytest.raises(UserError) as e: f(*args, **kw)
    assert sentence in str(e.value), str(e.value)


@pytest.mark.parametrize("source", [ClipFolder, "tars"])
@pytest.mark.parametrize("kind", ["latents", "pairs"])
def test_a_replaced_video_is_noticed_on_build_and_on_open(kind, source, teacher, videos, clips, tmp_path):
    def new():
        if source is ClipFolder: return ClipFolder(videos)
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        return Shards(write_shards(videos, tmp_path / "t", per_shard=2))
    build = lambda source=None: build_cache(kind, teacher, source or new(), tmp_path / "c", **SMALL)
    build(); first = open_cache(tmp_path / "c", teacher, data=new()).batch(0, 5)[0]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.safetensors")}
    build(); assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.safetensors")}     # nothing to do
    write_video(videos / "3.mp4", clips[7][0], 8)
    says("was built with data", open_cache, tmp_path / "c", teacher, data=new())
    with pytest.warns(UserWarning, match="videos of the .* cache .* were replaced since it was built"): build()
    second = open_cache(tmp_path / "c", teacher, data=new(), verify=True).batch(0, 5)[0]
    pick = (lambda x: x) if kind == "latents" else (lambda x: x.v)
    assert not torch.equal(pick(first), pick(second))
    fresh = open_cache(build_cache(kind, teacher, new(), tmp_path / "d", **SMALL), teacher).batch(0, 5)[0]
    assert torch.equal(pick(second), pick(fresh))
    says("was built with data", build, ClipFolder(videos, seed=9))                                        # another order is another cache
    (videos / "4.txt").write_text("another caption")
    if source is ClipFolder: says("was built with data", build)


def test_a_clip_that_breaks_while_a_cache_is_built(teacher, videos, tmp_path, monkeypatch):
    "The build goes on with a stand-in, and what was made stays"
    make, made = build.make_shard, []
    def broken(recipe, teacher, about, s, *rest):
        if s == 1: raise KeyboardInterrupt
        made.append(s); return make(recipe, teacher, about, s, *rest)
    monkeypatch.setattr(build, "make_shard", broken)
    with pytest.raises(KeyboardInterrupt): build_cache("latents", teacher, ClipFolder(videos), tmp_path / "c", **SMALL)
    monkeypatch.setattr(build, "make_shard", make)
    head, order = shard_path(tmp_path / "c", 0).read_bytes(), ClipFolder(videos).order(0).tolist()
    (videos / f"{order[3]}.mp4").write_bytes(b"torn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        build_cache("latents", teacher, ClipFolder(videos), tmp_path / "c", **SMALL)
    assert any(f"{order[3]}.mp4 is gone or broken" in str(w.message) for w in told) and not any("replaced" in str(w.message) for w in told)
    assert shard_path(tmp_path / "c", 0).read_bytes() == head
    cache = open_cache(tmp_path / "c", teacher, verify=True)
    assert cache.captions[3] == cache.captions[4] and len(cache) == 5                                     # place 4 stands in for 3


def test_changed_bytes_of_a_shard_are_noticed_where_they_are_read(teacher, videos, tmp_path):
    folder = build_cache("latents", teacher, ClipFolder(videos), tmp_path / "c", **SMALL)
    path = shard_path(folder, 1); raw = path.read_bytes(); was = path.stat()
    start = 8 + int.from_bytes(raw[:8], "little"); row = (len(raw) - start) // 2
    assert verify_cache(folder) == {}
    for at, sample in ((start + 5, 2), (start + row + 5, 3)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:]); os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        cache = open_cache(folder, teacher)
        assert cache.read([0, 1, 5 - sample])["z0"].shape[0] == 3                                          # the other rows are whole
        says("00001.safetensors of the cache", cache.read, [sample]); says("has changed since it was written", cache.batch, 1, 2)
        assert verify_cache(folder) == {1: "has changed since it was written"}
        says("has changed since it was written", open_cache, folder, teacher, verify=True)
    build_cache("latents", teacher, ClipFolder(videos), folder, verify=True, **SMALL)
    assert path.read_bytes() == raw and verify_cache(folder) == {}


def config(tmp_path, videos, **more):
    return Config(out=str(tmp_path / "run"), data=str(videos), batch=2, rank=2, track="", save_every=2, **more)


def run(cfg):
    "Parameters, and which captions each step saw"
    t = Trainer(cfg); t.resume(); start = t.step
    for row in t.fit(): pass
    return start, {n: p.detach().clone() for n, p in t.student.trainable().items()}, t


@pytest.mark.parametrize("harm", ["torn", "gone", "replaced"])
def test_a_run_is_resumed_or_refused(harm, videos, clips, tmp_path, monkeypatch):
    seen = []

    def look(self, feed):                                  # a step that only notes its clips
        step, x, captions = next(feed); seen.append((step, x.sum().item(), captions)); self.step += 1; self.agreed = False
        return dict(step=self.step, loss=0.)
    monkeypatch.setattr(Trainer, "one_step", look)
    run(config(tmp_path, videos, steps=2)); seen.clear()
    path = videos / "2.mp4"
    if harm == "torn": path.write_bytes(b"torn")
    elif harm == "gone": path.unlink()
    else: write_video(path, clips[7][0], 8)
    if harm == "replaced":
        with pytest.raises(UserError, match="'2.mp4' is another than when the run began"): run(config(tmp_path, videos, steps=6))
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always"); start, _, t = run(config(tmp_path, videos, steps=6))
    assert start == 2 and [s for s, *_ in seen] == [2, 3, 4, 5]
    assert any("2.mp4 is gone or broken since the run began" in str(w.message) for w in told)
    assert any(n.endswith("2.mp4") for n, _ in t.left_out())
    if harm == "torn": path.unlink()
    again = ClipFolder(videos); again.take_over(json.loads(json.dumps(t.source.record())))
    for step, total, captions in seen:
        x, c = again.batch(step, 2); assert captions == c and x.sum().item() == total
    start, _, t = run(config(tmp_path, videos, steps=6)); assert start == 6                              # and once more
