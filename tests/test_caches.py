"Caches: the same numbers as without them, whoever builds them and however often that is interrupted"
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2v_turbo.core import make_gen, step_gen, write_video
from t2v_turbo.data import build as building
from t2v_turbo.data import cache_files, recipes
from t2v_turbo.data.build import build_cache
from t2v_turbo.data.cache import open_cache
from t2v_turbo.data.cache_files import cache_bytes, claim_folder, key_of, read_about, shard_path
from t2v_turbo.data.clips import ClipFolder
from t2v_turbo.data.recipes import Latents, Pairs, data_id, dice, make_batch, teacher_id
from t2v_turbo.data.sources import Prompts
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.files import UserError
from t2v_turbo.rewards.tiny import load_reward
from t2v_turbo.solver import DDIM, TeacherAnswer, ask, ddim_sample, from_v, guided_step, to_v
from t2v_turbo.standins import tiny_modelscope, tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import ScaledSchedule, load_teacher
from t2v_turbo.teachers.videocrafter2 import x0_scale
from t2v_turbo.world import World

SMALL = dict(batch=2, shard=1, progress=False)              # shards of two samples
PROCESSES = get_context("forkserver")                 # forked from a process that has imported everything
PROCESSES.set_forkserver_preload(["t2v_turbo.data.build", "t2v_turbo.distill", "t2v_turbo.rewards.tiny"])
PAIRS = dict(kind="pairs", source=World(), samples=7, seed=3, dtype="float32", **SMALL)
@pytest.fixture(scope="module", autouse=True)
def one_thread(): # sums are added in the same order, as in `build`
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def teacher(): return load_teacher("tiny")


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory): # of PAIRS, never disturbed, never changed
    return build_cache(teacher=teacher, folder=tmp_path_factory.mktemp("c")/"pairs", **PAIRS)


@pytest.fixture
def pairs(whole, tmp_path): # to be damaged
    shutil.copytree(whole, tmp_path/"pairs")
    return tmp_path/"pairs"


def start(f, *args):
    "A process of its own"
    p = PROCESSES.Process(target=f, args=args)
    p.start()
    return p


def exit_code(p):
    p.join(240)
    return p.exitcode


def kill(*args): os.kill(os.getpid(), signal.SIGKILL)


def build(folder, rank=0, n=1, when=None):
    "Build PAIRS; SIGKILL ends it at a chosen moment: by name, or after so many calls of functions"
    torch.set_num_threads(1)
    teacher, ask, save, asked, saved = load_teacher("tiny"), recipes.ask, cache_files.save_file, [], []

    def ask_or_die(*args):                            # in the second shard, while the teacher is asked
        asked.append(1)
        return kill() if len(asked) == 2 else ask(*args)

    def save_or_die(tensors, path, head):             # half of the third shard is written, beside its place
        save(tensors, path, head); saved.append(1)
        if len(saved) == 3: os.truncate(path, os.path.getsize(path)//2); kill()

    if when == "network": recipes.ask = ask_or_die
    if when == "writing": cache_files.save_file = save_or_die
    if when == "merging": building.merge_manifest = kill
    if isinstance(when, int): sys.setprofile(calls(when, kill))
    build_cache(teacher=teacher, folder=folder, **PAIRS, rank=rank, num_processes=n)
    sys.setprofile(None)


def calls(n, then):
    "For `sys.setprofile`: counts the calls, and calls `then` at the n-th"
    def count(frame, event, arg):
        if event in ("call", "c_call"):
            count.n += 1
            if count.n == n: then()
    count.n = 0
    return count


def files(folder): return {p.name: p.read_bytes() for p in folder.glob("[!.]*")}      # none in a folder that is not there yet


# --- the numbers ---------------------------------------------------------------------------------

def test_dice_are_the_cache_s_own():
    "Those of a seed and a step, and not the noise that training draws there"
    for seed, step in ((0, 0), (3, 7), (9000, 12)):
        d = draw(Objective(k=20), (2, 16, 8, 8, 8), step_gen(seed, step, "noise")) # as `Trainer.backward`
        (noise, index), again = (dice(seed, step, (2, 16, 8, 8, 8), 50) for _ in range(2))
        assert torch.equal(noise, again[0]) and torch.equal(index, again[1]) and index.max() < 50
        assert (noise - d.noise).abs().max() > 1


def test_training_from_the_cache_is_training(whole, tmp_path):
    "Loss and gradient of a step, computed and from the caches, at the batch size and the seed of the cache"
    student = Student(load_teacher("tiny"), rank=4)
    gen = make_gen(0)
    with torch.no_grad(): # away from B = 0, so that every weight has a gradient
        for p in student.trainable().values(): p.add_(.02*torch.randn(p.shape, generator=gen))
    rewards = load_reward("tiny-image"), load_reward("tiny-video")
    T, step, cfg = student.teacher, 2, Objective()
    clips, prompts = World().batch(step, 2)
    noise, index = dice(3, step, (2, *T.latent_shape), 50)
    d = replace(draw(cfg, (2, *T.latent_shape), step_gen(3, step, "noise")), noise=noise, index=index)
    pairs = open_cache(whole, T, k=cfg.k, seed=3, data=World()) # an adapted teacher is the same teacher
    with student.as_teacher() as adapters_off:
        texts = open_cache(build_cache("text", adapters_off, prompts, tmp_path/"t", dtype="float32", **SMALL), T)
    train, (pair, told) = Distillation(student, cfg, *rewards), pairs.batch(step, 2)
    assert told == prompts and torch.equal(pair.index, d.index)
    got = []
    for out in (train(T.encode(clips), T.encode_text(prompts), T.encode_text([""]*2), prompts, d),
                train(None, texts(prompts), None, prompts, d, pair=pair)):
        got.append((out.loss, torch.autograd.grad(out.loss.mean(), list(student.trainable().values()))))
    torch.testing.assert_close(got[1], got[0], rtol=1e-4, atol=1e-5)
    assert all(g.abs().max() > 0 for g in got[0][1])
    later = draw(cfg, (2, *T.latent_shape), make_gen(1))  # the pair at another step, as on a second visit
    assert not torch.equal(later.index, pair.index)
    with torch.no_grad(): a, b = (train(None, texts(prompts), None, prompts, d, pair=pair).cd
                                  for d in (later, replace(later, index=pair.index)))
    torch.testing.assert_close(a, b)                      # its timesteps are the pair's, not the step's


@pytest.mark.parametrize("kind", ["tiny", "modelscope", "videocrafter2", "wan"])
def test_pairs_of_every_process(kind, teacher, tmp_path):
    "v and slope give equation 7, whatever is predicted and however data and noise are mixed"
    T = teacher if kind == "tiny" else tiny_wan() if kind == "wan" else load_teacher(
        tiny_modelscope(tmp_path/"ms"), frames=3, size=(16, 24))
    if kind == "videocrafter2": T.schedule = ScaledSchedule(T.schedule.abar, x0_scale(1000))
    ddim, index = DDIM(T.schedule, 50), torch.tensor([0, 20, 35, 49])
    z0, noise = torch.randn(2, 4, *T.latent_shape, generator=make_gen(0))
    zt, w = T.schedule.add_noise(z0, noise, ddim.t(index)), torch.tensor([0., 1., 7.5, 15.])
    ctx, null = T.encode_text(list("abcd")), T.encode_text([""])
    with torch.no_grad():
        pair = ask(ddim, T.denoise, zt, index, ctx, null)
        want = guided_step(ddim, T.denoise, zt, index, w, ctx, null)
    torch.testing.assert_close(pair.step(ddim, w), want, atol=1e-4, rtol=1e-4)
    assert pair.slope.abs().max() > 0
    t = torch.arange(1000)
    x, eps = torch.randn(2, 1000, 8, generator=make_gen(1))
    back = from_v(T.schedule, T.schedule.add_noise(x, eps, t), to_v(T.schedule, x, eps, t), t)
    torch.testing.assert_close(back, (x, eps), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, unit", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_answers_exactly_where_it_stands(teacher, dtype, unit):
    "The stored z_t is the point the teacher was asked at; only v and the slope are rounded"
    dtype = getattr(torch, dtype)
    got, captions = make_batch(Pairs(World()), teacher, 0, 4, dtype)
    assert {v.dtype for n, v in got.items() if n != "index"} == {dtype}
    stored = TeacherAnswer(**{n: v if n == "index" else v.float() for n, v in got.items()})
    ddim = DDIM(teacher.schedule, 50)
    with torch.no_grad(): true = ask(ddim, teacher.denoise, stored.zt, stored.index, teacher.encode_text(captions),
                                     teacher.encode_text([""]))
    for a, b in ((stored.v, true.v), (stored.slope, true.slope)):
        torch.testing.assert_close(a, b, rtol=unit, atol=1e-5)
    w = torch.full((4,), 15.)
    step, off = true.step(ddim, w) - true.zt, stored.step(ddim, w) - true.step(ddim, w)
    assert off.norm() < unit*step.norm()


def test_samples_are_those_of_the_teacher(teacher, tmp_path):
    prompts = ["a red fish moving left in the sea", "a blue cat growing in the meadow"]
    source = Prompts(prompts)
    z = open_cache(build_cache("samples", teacher, prompts, tmp_path/"z", 3, steps=4, w=3., seed=1, dtype="float32", **SMALL),
                   teacher, steps=4, w=3., data=source)
    got, told = z.batch(0, 2)
    noise = torch.randn(2, *teacher.latent_shape, generator=step_gen(1, 0, "samples"))
    with torch.no_grad(): *_, (_, _, want) = ddim_sample(DDIM(teacher.schedule, 4), teacher.denoise, noise, 3.,
                                                         teacher.encode_text(told), teacher.encode_text([""]))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert z.captions == source.batch(0, 3)[1] and sorted(told) == sorted(prompts) and z.kind == "latents"
    assert not torch.equal(noise, dice(1, 0, noise.shape, 50)[0]) # not the noise that training adds
    pair, _ = make_batch(Pairs(z), teacher, 0, 2, torch.float32)  # no clip and no VAE on the way
    noise, index = dice(0, 0, (2, *teacher.latent_shape), 50)
    torch.testing.assert_close(pair["zt"], teacher.schedule.add_noise(got, noise, DDIM(teacher.schedule, 50).t(index)))


def test_texts(teacher, tmp_path):
    prompts = ["a red fish moving left in the sea", "a blue cat growing in the meadow", "a red fish moving left in the sea"]
    texts = open_cache(build_cache("text", teacher, prompts, tmp_path/"t", dtype="float32", **SMALL), teacher)
    assert texts.captions == ["", *prompts[:2]]
    asked = [prompts[1], "", prompts[1], prompts[0]]
    torch.testing.assert_close(texts(asked), teacher.encode_text(asked), atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="'a cat' is not in the text cache"): texts(["a cat"])
    seen = open_cache(build_cache("text", teacher, World(), tmp_path/"s", 4, dtype="float32", **SMALL), teacher)
    assert set(seen.captions) == {"", *World().batch(0, 2)[1], *World().batch(1, 2)[1]}
    a, b = (make_batch(Pairs(World(), texts=t), teacher, 1, 2, torch.float32)[0] for t in (seen, None))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_half_precision_is_named(teacher, monkeypatch):
    real = type(teacher).encode
    monkeypatch.setattr(type(teacher), "encode", lambda self, x, gen=None: real(self, x)*1e6)
    with pytest.raises(UserError, match="z0 of step 0 is not finite as float16: store bfloat16 or float32"):
        make_batch(Latents(World()), teacher, 0, 1)
    make_batch(Latents(World()), teacher, 0, 1, torch.bfloat16)
    monkeypatch.setattr(type(teacher), "encode", lambda self, x, gen=None: real(self, x)*float("nan"))
    with pytest.raises(UserError, match="the teacher or the data are broken there"):
        make_batch(Latents(World()), teacher, 0, 1, torch.float32)


def test_small_pieces_give_the_same(teacher, monkeypatch):
    ask, seen = recipes.ask, []
    monkeypatch.setattr(recipes, "ask", lambda ddim, denoise, zt, *a: seen.append(len(zt)) or ask(ddim, denoise, zt, *a))
    a, b = (make_batch(Pairs(World()), teacher, 1, 3, torch.float32, n) for n in (0, 2))
    assert seen == [3, 2, 1]
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-4)
    assert a[1] == b[1]


# --- building ------------------------------------------------------------------------------------

def test_killed_and_gone_on_is_bit_identical(whole, tmp_path):
    there = []
    for when in ("network", "writing", "merging"):
        assert exit_code(start(build, tmp_path/"c", 0, 1, when)) == -signal.SIGKILL
        there.append(files(tmp_path/"c"))
        assert all(files(whole)[n] == data for n, data in there[-1].items())
    assert [len(names) for names in there] == [1 + 1, 1 + 1 + 2, 1 + 4] # the index, and the shards that were done
    assert list((tmp_path/"c").glob(".tmp-*"))        # half a shard, which the kill left lying
    assert exit_code(start(build, tmp_path/"c")) == 0 and files(tmp_path/"c") == files(whole)


def test_killed_at_any_moment(whole, teacher, tmp_path):
    "Between any two calls, Python's and C's"
    counter = calls(-1, None)
    sys.setprofile(counter)
    build_cache(teacher=teacher, folder=tmp_path/"count", **PAIRS)
    sys.setprofile(None)
    at, kills = torch.randint(1, counter.n//2, (8,), generator=make_gen(0)).tolist(), 0
    for n in at:
        code = exit_code(start(build, tmp_path/"c", 0, 1, n))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        assert all(files(whole)[name] == data for name, data in files(tmp_path/"c").items()) # nothing half done
    assert kills > 3
    assert exit_code(start(build, tmp_path/"c")) == 0 and files(tmp_path/"c") == files(whole)


def read(cache, steps, out):
    torch.save([vars(cache.batch(step, 2)[0]) for step in steps], out)


def test_processes_side_by_side_are_bit_identical(whole, tmp_path):
    "Two that share the work, a third that does all of it, and readers in processes of their own"
    folder = tmp_path/"c"
    assert exit_code(start(build, folder, 1, 2)) == 0
    assert sorted(files(folder)) == ["00001.safetensors", "00003.safetensors", "cache.json"] # its half
    shutil.rmtree(folder)
    ps = [start(build, folder, 0, 2), start(build, folder, 1, 2), start(build, folder)]
    assert [exit_code(p) for p in ps] == [0, 0, 0]
    assert files(folder) == files(whole) and not list(folder.glob(".tmp-*"))
    cache, steps = open_cache(folder), ([0, 5, 2, 3], [3, 2, 1, 0])
    ps = [start(read, cache, s, tmp_path/f"{i}.pt") for i, s in enumerate(steps)]
    assert [exit_code(p) for p in ps] == [0, 0]
    for i, s in enumerate(steps):
        for step, got in zip(s, torch.load(tmp_path/f"{i}.pt", weights_only=True)):
            assert all(torch.equal(v, got[n]) for n, v in vars(cache.batch(step, 2)[0]).items())


def test_nothing_is_made_twice_and_old_rubbish_goes(pairs, teacher, monkeypatch):
    (pairs/".tmp-old").mkdir(); (pairs/".tmp-new").mkdir()
    os.utime(pairs/".tmp-old", (time.time() - 7200,)*2)
    monkeypatch.setattr(building, "make_shard", lambda *a: pytest.fail("a shard was made again"))
    build_cache(teacher=teacher, folder=pairs, **PAIRS)
    assert [p.name for p in pairs.glob(".tmp-*")] == [".tmp-new"] # a build on another machine may be at work there


def test_a_cache_can_grow(pairs, teacher):
    before = files(pairs)
    build_cache(teacher=teacher, folder=pairs, **PAIRS | dict(samples=9))
    after = files(pairs)
    assert len(open_cache(pairs, teacher, verify=True)) == 9 and len(after) == len(before) + 1
    assert all(after[f"0000{i}.safetensors"] == before[f"0000{i}.safetensors"] for i in range(3))
    assert len(after["00003.safetensors"]) > len(before["00003.safetensors"]) # had one sample, has two
    with pytest.raises(UserError, match="a cache can grow, not shrink"):
        build_cache(teacher=teacher, folder=pairs, **PAIRS)
    assert files(pairs) == after


def test_a_full_disk(teacher, tmp_path, monkeypatch):
    how = dict(kind="latents", source=World(), samples=4, teacher=teacher, folder=tmp_path/"z", **SMALL)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard)) # bytes a file may have
    try:
        with pytest.raises(UserError, match="shard 00000.safetensors cannot be written into .* make room"):
            build_cache(**how)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(files(tmp_path/"z")) == ["cache.json"] and not list((tmp_path/"z").glob(".tmp-*"))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(building, "make_shard", lambda *a: pytest.fail("nothing should be computed"))
    with pytest.raises(UserError, match="are free: give another folder"): build_cache(**how)


def test_sizes_are_those_of_the_files(whole, teacher, tmp_path):
    made = dict(pairs=(whole, "float32", teacher.latent_shape, 7))
    for kind, source, n in (("latents", World(), 7), ("text", World("all").batch(0, 40)[1], None)):
        folder = build_cache(kind, teacher, source, tmp_path/kind, n, dtype="float16", batch=8, progress=False)
        made[kind] = folder, "float16", (9, 96) if kind == "text" else teacher.latent_shape, len(open_cache(folder))
    for kind, (folder, dtype, shape, n) in made.items():
        told = cache_bytes(kind, n, shape, dtype)
        real = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        data = sum(v.nbytes for p in folder.glob("*.safetensors") for v in load_file(p).values())
        assert data == told and told < real < 1.1*told, kind
    assert cache_bytes("pairs", 1000, (4, 16, 40, 64)) == 1000*(3*2*4*16*40*64 + 8)


# --- reading -------------------------------------------------------------------------------------

def test_order_and_resume(whole):
    a, b = open_cache(whole), pickle.loads(pickle.dumps(open_cache(whole)))
    ids = [i for s in range(7) for _, i in a.picks(s, 2)]
    assert ids[:7] == list(range(7)) and sorted(ids[7:]) == list(range(7)) and ids[7:] != list(range(7))
    for step in (5, 2):                              # in any order, from another object
        one, two = a.batch(step, 2), b.batch(step, 2)
        assert one[1] == two[1] and all(torch.equal(x, y) for x, y in zip(vars(one[0]).values(), vars(two[0]).values()))
    both, _ = a.batch(5, 2)
    for rows in (slice(0, 1), slice(1, 2)):
        assert all(torch.equal(v, vars(both[rows])[n]) for n, v in vars(a.batch(5, 2, rows)[0]).items())
    other = open_cache(whole, reorder=1)
    assert other.picks(0, 7) == a.picks(0, 7) and other.picks(1, 7) != a.picks(1, 7)
    got = a.read([6, 0, 6])
    assert torch.equal(got["v"][0], got["v"][2]) and torch.equal(got["v"][1], a.read([0])["v"][0])
    assert got["v"].dtype == torch.float32 and got["index"].dtype == torch.int64


def test_rows_of_shards_of_several_batches(teacher, tmp_path):
    "Sample by sample against the whole files, and batch by batch against the encoder"
    z = open_cache(build_cache("latents", teacher, World(), tmp_path/"z", 7, dtype="float32", **SMALL | dict(shard=2)), teacher)
    whole = torch.cat([load_file(shard_path(tmp_path/"z", s))["z0"] for s in range(2)])
    assert len(whole) == 7 and torch.equal(z.read(range(7))["z0"], whole) and torch.equal(z.read([5, 1])["z0"], whole[[5, 1]])
    for step in (0, 1, 2):
        got, captions = z.batch(step, 2)
        clips, told = World().batch(step, 2)
        torch.testing.assert_close(got, teacher.encode(clips), atol=1e-5, rtol=1e-5)
        assert captions == told


def test_another_teacher_or_other_settings_are_refused(whole, teacher, tmp_path):
    other = load_teacher("tiny")
    with torch.no_grad(): other.vae.synthesise.bias.add_(1.)
    with pytest.raises(UserError, match=r"built with vae float32 \w{16}, not float32 \w{16}: use it"): open_cache(whole, other)
    with torch.no_grad(): next(other.denoiser.parameters()).add_(1.)
    with pytest.raises(UserError, match=r"built with vae float32 \w{16}, not \w+ \w{16}; denoiser float32"): open_cache(whole, other)
    for wrong, told in ((dict(k=40), "k 20, not 40"), (dict(seed=1), "seed 3, not 1"), (dict(dtype="float16"), "dtype float32"),
                        (dict(data=World(frames=4)), "frames=8"), (dict(w=3), "w unknown, not 3")):
        with pytest.raises(UserError, match=told): open_cache(whole, teacher, **wrong)
    for wrong, told in ((dict(seed=1), "seed 3, not 1"), (dict(batch=4), "batch 2, not 4"), (dict(k=50), "k 20, not 50"),
                        (dict(source=World(seed=1)), "seed=0"), (dict(dtype="float16"), "dtype float32, not float16")):
        before = files(whole)
        with pytest.raises(UserError, match=told): build_cache(teacher=teacher, folder=whole, **PAIRS | wrong)
        assert files(whole) == before
    ms = load_teacher(tiny_modelscope(tmp_path/"ms"))
    before = teacher_id(ms, ["schedule", "text", "vae", "denoiser"])
    ms.schedule = ScaledSchedule(ms.schedule.abar, x0_scale(1000))
    after = teacher_id(ms, ["schedule", "text", "vae", "denoiser"])
    assert [k for k in before if before[k] != after[k]] == ["schedule"]
    tiny = teacher_id(teacher, before)
    assert all(before[k] != tiny[k] for k in before)
    words = teacher_id(ms, ["text", "tokens"])
    ms.tokenizer.add_tokens(["fish"])                # the same weights, other ids
    assert [k for k, v in teacher_id(ms, ["text", "tokens"]).items() if v != words[k]] == ["tokens"]


def test_every_value_of_a_network_counts_and_the_depth_of_its_names_does_not():
    own, other = load_teacher("tiny"), load_teacher("tiny")
    parts = dict(text="text_encoder", vae="vae", denoiser="denoiser")
    for part, name in parts.items():
        big = max(getattr(other, name).parameters(), key=lambda p: p.numel())
        with torch.no_grad(): big.view(-1)[big.numel()//2 + 1] += 1.
        assert teacher_id(own, [part]) != teacher_id(other, [part]), part
    deeper = torch.nn.Module(); deeper.text_model = own.text_encoder     # as older versions of transformers name it
    before, own.text_encoder = teacher_id(own, ["text"]), deeper
    assert teacher_id(own, ["text"]) == before


def test_a_rounded_base_is_the_same_teacher(whole, pairs):
    "The answers of the float32 teacher serve a training whose frozen networks are bfloat16; no more can be built so"
    half = load_teacher("tiny", dtype=torch.bfloat16)
    assert len(open_cache(whole, half)) == 7
    with pytest.raises(UserError, match=r"denoiser float32 \w{16}, not bfloat16 \w{16}"):
        build_cache(teacher=half, folder=pairs, **PAIRS | dict(samples=9))
    with torch.no_grad(): half.denoiser.patch_out.bias.add_(1.)
    with pytest.raises(UserError, match=r"built with denoiser float32 \w{16}, not bfloat16 \w{16}: use"): open_cache(whole, half)


def test_real_files_and_their_identity(teacher, tmp_path):
    clips, captions = World(clean=True).batch(0, 3)
    for i in range(3):
        write_video(tmp_path/"v"/f"{i}.mp4", clips[i]); (tmp_path/"v"/f"{i}.txt").write_text(captions[i])
    source = ClipFolder(tmp_path/"v")
    folder = build_cache("latents", teacher, source, tmp_path/"z", dtype="float32", **SMALL) # as many as there are
    z = open_cache(folder, teacher, data=source)
    x, told = source.batch(1, 2)
    assert len(z) == 3 and z.captions[2] == told[0] and sorted(z.captions) == sorted(captions)
    torch.testing.assert_close(z.read([2])["z0"], teacher.encode(x[:1]), atol=1e-5, rtol=1e-5)
    shutil.copytree(tmp_path/"v", tmp_path/"moved")
    open_cache(folder, teacher, data=ClipFolder(tmp_path/"moved"))
    for other in (ClipFolder(tmp_path/"v", fps=16), ClipFolder(tmp_path/"v", seed=1)):
        with pytest.raises(UserError, match="data "): open_cache(folder, data=other)
    (tmp_path/"v"/"0.txt").write_text("something else")
    assert data_id(ClipFolder(tmp_path/"v")) != data_id(source)


# --- damage --------------------------------------------------------------------------------------

def flip(path):
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)


def foreign(path):
    save_file({"x": torch.zeros(3)}, path)


DAMAGE = {                                            # how, what is told with a manifest, and without
    "cut": (lambda p: os.truncate(p, p.stat().st_size - 5), r"has \d+ bytes instead of \d+", r"is cut off or .* \(\d+ bytes\)"),
    "empty": (lambda p: os.truncate(p, 0), r"has 0 bytes instead of \d+", r"is cut off or .* \(0 bytes\)"),
    "gone": (lambda p: p.unlink(), "is missing", "is missing"),
    "swapped": (lambda p: shutil.copy(p.with_name("00001.safetensors"), p), r"is a copy of shard 1|has \d+ bytes instead of \d+", "is a copy of shard 1"),
    "changed": (flip, "has changed since it was written", "has changed since it was written"),
    "foreign": (foreign, r"has 76 bytes instead of \d+", "does not belong to this cache"),
}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_only_that_shard_is_made_again(what, manifest, pairs, whole, teacher):
    harm, *told = DAMAGE[what]
    if not manifest: (pairs/"manifest.json").unlink()
    good = open_cache(pairs)                          # before the damage: what a running training holds
    harm(shard_path(pairs, 2))
    with pytest.raises(UserError, match=f"shard 00002.safetensors of the cache .* ({told[not manifest]}): ") as e:
        open_cache(pairs, teacher, verify=what in ("swapped", "changed"))
    assert "build the same cache into this folder again" in str(e.value) and str(pairs) in str(e.value)
    if what != "changed":
        with pytest.raises(UserError, match="shard 00002.safetensors"): good.read([4])
    good.read([0, 6])                                 # the others can still be read
    when = {p.name: p.stat().st_mtime_ns for p in pairs.glob("*.safetensors")}
    build_cache(teacher=teacher, folder=pairs, verify=what == "changed", **PAIRS)
    assert files(pairs) == files(whole)
    assert [n for n, t in when.items() if (pairs/n).stat().st_mtime_ns != t] == (["00002.safetensors"] if what != "gone" else [])
    good.read([4])


def test_indices_that_are_none_or_another_s(pairs, teacher, tmp_path):
    index, good = pairs/"cache.json", (pairs/"cache.json").read_text()
    for bad in ("", "{", "[]", '{"kind": "pairs"}'):
        index.write_text(bad)
        with pytest.raises(UserError, match="cache.json.* is not the index of a cache"): open_cache(pairs)
    index.write_text(json.dumps(json.loads(good) | dict(k=40)))
    with pytest.raises(UserError, match=r"00000.safetensors \(and 3 more of 4\) .* does not belong to this cache"): open_cache(pairs)
    index.write_text(json.dumps(json.loads(good) | dict(kind="gold")))
    with pytest.raises(UserError, match="kind 'gold', which is unknown here"): open_cache(pairs)
    index.write_text(good)
    (pairs/"manifest.json").write_text("{")           # it can be made from the shards
    assert len(open_cache(pairs, teacher).captions) == 7
    with pytest.raises(UserError, match="there is no cache in"): open_cache(tmp_path/"nowhere")
    assert key_of(read_about(pairs)) == json.loads(safe_open(shard_path(pairs, 0), "pt").metadata()["cache"])["key"]


WRONG = [
    (dict(kind="gold"), "no cache of kind 'gold'"), (dict(w=3), "a pairs cache has no option 'w'"),
    (dict(batch=0), "batch is 0"), (dict(dtype="int8"), "dtype 'int8': give one of"), (dict(rank=2, num_processes=2), "rank 2 of 2"),
    (dict(samples=None), "World has no end"), (dict(k=7), "k 7 does not divide 1000"),
    (dict(at_once=-1), "at_once is -1: give 0 or more"), (dict(samples=-5), "samples is -5: give 0 or more"),
    (dict(kind="samples", source=["a cat"], k=None, steps=0), "steps is 0: give 1 to 1000"),
    (dict(kind="samples", source=["a cat"], k=None, w=math.nan), "w is nan: give a number"),
    (dict(source=World(frames=4)), r"clips of \[3, 4, 64, 64\] .* teacher.s are \[3, 8, 64, 64\]"),
    (dict(source=object()), "does not say what data it gives"), (dict(kind="text", seed=0), "a text cache has no option 'seed'"),
]


@pytest.mark.parametrize("wrong, told", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_mistakes(wrong, told, teacher, tmp_path):
    how = {k: v for k, v in (PAIRS | wrong).items() if k != "k" or v is not None}
    with pytest.raises(UserError, match=told): build_cache(teacher=teacher, folder=tmp_path/"c", **how)
    assert not list(tmp_path.glob("c/*.safetensors")) and ("clips of" in told or not (tmp_path/"c").exists())


def test_an_index_without_a_shard_binds_nobody(teacher, tmp_path):
    "What went wrong before anything was made may be put right with another setting"
    with pytest.raises(UserError, match="clips of"): build_cache(teacher=teacher, folder=tmp_path/"c", **PAIRS | dict(source=World(frames=4)))
    assert (tmp_path/"c"/"cache.json").is_file()
    assert len(open_cache(build_cache(teacher=teacher, folder=tmp_path/"c", **PAIRS), teacher)) == PAIRS["samples"]
    with pytest.raises(UserError, match="was built with"): build_cache(teacher=teacher, folder=tmp_path/"c", **PAIRS | dict(seed=9))


def test_folders_that_hold_something_else(teacher, tmp_path):
    (tmp_path/"notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files: give a new folder"):
        build_cache(teacher=teacher, folder=tmp_path, **PAIRS)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="a source of prompts was given where clips or latents are needed"):
        source = type("P", (), dict(kind="prompts", fingerprint=lambda self: "p"))()
        build_cache(teacher=teacher, folder=tmp_path/"c", **PAIRS | dict(source=source))
    with pytest.raises(UserError, match="has no list of its captions: give a list of texts, or say how many"):
        build_cache("text", teacher, World(), tmp_path/"t", progress=False)
    with pytest.raises(UserError, match="a source of clips was given where prompts are needed"):
        build_cache("samples", teacher, World(), tmp_path/"s", samples=4, progress=False)


def test_two_that_start_one_cache(whole, tmp_path, monkeypatch):
    "One writes the index while the other looks around in the folder: it is not taken for a stranger's"
    about, look, folder = read_about(whole), type(tmp_path).iterdir, tmp_path/"c"
    folder.mkdir()
    def late(self):
        (self/"cache.json").write_bytes((whole/"cache.json").read_bytes())
        return look(self)
    monkeypatch.setattr(type(tmp_path), "iterdir", late)
    assert claim_folder(folder, about) == folder
    monkeypatch.undo(); (folder/"cache.json").rename(folder/"other.txt")
    with pytest.raises(UserError, match="holds other files"): claim_folder(folder, about)
