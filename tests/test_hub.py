"The hub as it is: several formats, gated, private, missing, busy, slow, cut off, offline; and every loading path of the package through it"
import json
import subprocess
import sys
from pathlib import Path

import hub
import pytest

from t2v_turbo.files import UserError
from t2v_turbo.hub import fetch_file, in_words, pick, wanted, weight_sets

ROOT = Path(__file__).resolve().parents[1]
FILE, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


def run(served, home, code, **more):
    "A program with the stand-in for its hub; what it prints, and on the error output"
    head = """if True:
        import json, sys
        from t2v_turbo.files import UserError
        def told(f, *args, **more):
            try: f(*args, **more)
            except UserError as e: return str(e)
            return ""
        """
    env = hub.environment(served, home, PYTHONPATH=f"{ROOT}:{ROOT/'tests'}", **more)
    body = "\n".join(f"        {line}" for line in code.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", head + "\n" + body], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip(), done.stderr


def fetched(out): return json.loads(out.splitlines()[-1])


FETCH = """
from t2v_turbo.hub import fetch_folder
at = fetch_folder({name!r}{more})
print(json.dumps(sorted(p.relative_to(at).as_posix() for p in at.rglob("*") if p.is_file())))
"""


def fetch(served, home, name="owner/model", more="", **env): return run(served, home, FETCH.format(name=name, more=more), **env)


@pytest.fixture
def served(tmp_path):
    "A pipeline of a few bytes, in all formats"
    at = tmp_path/"repos/owner/model"
    for name in (f"unet/{FILE}", f"unet/{HALF}", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin",
                 "unet/diffusion_flax_model.msgpack", "unet/model.onnx", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
                 "safety_checker/model.safetensors", "old.ckpt", "README.md", "assets/a/b.json"):
        (at/name).parent.mkdir(parents=True, exist_ok=True)
        (at/name).write_bytes(name.encode()*(40 if "fp16" in name else 80))
    for name in ("unet/config.json", "text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        (at/name).parent.mkdir(parents=True, exist_ok=True); (at/name).write_text(json.dumps([name]))
    (at/"model_index.json").write_text(json.dumps(dict(unet=["diffusers", "U"], text_encoder=["transformers", "C"],
                                                       tokenizer=["transformers", "T"], safety_checker=["x", "Y"])))
    with hub.serve(tmp_path/"repos") as server: yield server


SMALL = ["model_index.json", "text_encoder/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json"]


# ---- choice of files

def test_sets_of_weights():
    shards = [f"model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    assert weight_sets(shards) == {}, "without its index a set is not whole"
    both = [*shards, "model.safetensors.index.fp16.json"]
    assert weight_sets(both) == {("fp16", "safetensors"): both}
    assert weight_sets(both[1:]) == {}, "a shard is missing"
    new = ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"]
    assert [*weight_sets(new)] == [("fp16", "safetensors")]
    assert weight_sets(["open_clip_pytorch_model.bin", "flax_model.msgpack", "model.onnx", "model.ckpt", "xmodel.bin"]) == {}


@pytest.mark.parametrize("files, variant, dtype, want", [
    ([("", "bin"), ("", "safetensors")], None, None, ("", "safetensors")),
    ([("", "safetensors"), ("fp16", "bin")], None, "float16", ("fp16", "bin")),
    ([("", "safetensors"), ("fp16", "safetensors")], None, "bfloat16", ("", "safetensors")),
    ([("", "safetensors"), ("bf16", "safetensors")], None, "torch.bfloat16", ("bf16", "safetensors")),
    ([("", "safetensors"), ("fp16", "safetensors")], "fp16", "float32", ("fp16", "safetensors")),
    ([("", "safetensors"), ("fp16", "safetensors")], "other", "float16", ("fp16", "safetensors")),
    ([("non_ema", "bin"), ("fp16", "bin")], None, "float32", ("fp16", "bin")), ([], None, None, None)])
def test_one_set_is_picked(files, variant, dtype, want): assert pick(dict.fromkeys(files), variant, dtype) == want


def test_a_variant_that_no_part_has():
    names = [f"unet/{FILE}", f"unet/{HALF}", "vae/" + FILE]
    with pytest.raises(UserError, match="no weights of variant 'int4': give one of fp16, or leave it out"): wanted(names, None, "int4")
    assert wanted(names, None, "fp16") == [f"unet/{HALF}", "vae/" + FILE], "a part without it has the plain one"


def test_names_of_files():
    for name in ("model.pt", "a/b", "/a/b/c.pt", "../a/b.pt"):
        with pytest.raises(UserError, match="names no file on the hub"): fetch_file(name)
    assert "did you mean 'ali-vilab/text-to-video-ms-1.7b'" in in_words(hub_error(401), "ali-vilab/text-to-video-ms-1.7")


def hub_error(status):
    from types import SimpleNamespace
    e = OSError("no"); e.response = SimpleNamespace(status_code=status)
    return e


# ---- what is fetched

@pytest.mark.parametrize("more, unet", [("", FILE), (", dtype='float16'", HALF), (", 'fp16'", HALF), (", dtype='bfloat16'", FILE)])
def test_one_copy_of_each_network(served, tmp_path, more, unet):
    out, err = fetch(served, tmp_path/"home", more=more)
    assert fetched(out) == served.fetched() == sorted([*SMALL, f"unet/{unet}", "text_encoder/model.safetensors"])
    assert "fetching owner/model: " in err and " files, " in err and err.count("fetching owner/model") == 1
    before = len(served.log)
    again, err = fetch(served, tmp_path/"home", more=more)
    assert again == out and "fetching" not in err and not [row for row in served.log[before:] if "/resolve/" in row[1] and row[3]]


def test_only_half_precision_or_only_pickles(served, tmp_path):
    at = served.folder/"owner/model"
    for f in [*at.glob("*/*.safetensors")]:
        if f.name != HALF and f.parent.name != "safety_checker": f.unlink()
    (at/"unet/diffusion_pytorch_model.bin").unlink()
    out, _ = fetch(served, tmp_path/"home")
    assert fetched(out) == sorted([*SMALL, f"unet/{HALF}", "text_encoder/pytorch_model.bin"])
    (at/"unet"/HALF).unlink()
    out, _ = fetch(served, tmp_path/"other")
    assert "unet/diffusion_pytorch_model.fp16.bin" in fetched(out)


def test_shards_come_with_their_index(served, tmp_path):
    at = served.folder/"owner/model/unet"
    (at/FILE).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)] + [f"{FILE}.index.json"]
    for n in names: (at/n).write_text("{}")
    out, _ = fetch(served, tmp_path/"home", more=", dtype='float32'")
    assert {f"unet/{n}" for n in names} <= {*fetched(out)} and f"unet/{HALF}" not in fetched(out)


def test_a_revision_is_kept(served, tmp_path):
    import shutil
    shutil.copytree(served.folder/"owner/model", served.folder/"owner/model@v1")
    (served.folder/"owner/model@v1/unet/config.json").write_text('{"old": 1}')
    read = "\nprint((at/'unet/config.json').read_text())"
    commit = served.commit(served.folder/"owner/model@v1")
    for name, want in (("owner/model@v1", '{"old": 1}'), ("owner/model", '["unet/config.json"]'), (f"owner/model@{commit}", '{"old": 1}')):
        assert run(served, tmp_path/"home", FETCH.format(name=name, more="") + read)[0].endswith(want)
    offline = run(served, tmp_path/"home", FETCH.format(name="owner/model@v1", more="") + read, HF_HUB_OFFLINE="1")[0]
    assert offline.endswith('{"old": 1}')
    out, _ = run(served, tmp_path/"home", "from t2v_turbo.hub import fetch_folder\nprint(told(fetch_folder, 'owner/model@v9'))")
    assert "'owner/model' has no revision 'v9'" in out


def test_one_file(served, tmp_path):
    code = """
from t2v_turbo.hub import fetch_file
print(fetch_file("owner/model/old.ckpt").read_bytes() == b"old.ckpt"*80, told(fetch_file, "owner/model/old.ckp"), told(fetch_file, "owner/none/a.pt"), sep="|")
"""
    same, near, none = run(served, tmp_path/"home", code)[0].split("|")
    assert same == "True" and served.fetched() == ["old.ckpt"]
    assert "has no file 'old.ckp' (did you mean 'old.ckpt'?)" in near and "there is no model 'owner/none' on the hub" in none
    assert run(served, tmp_path/"home", code.replace(', told(fetch_file, "owner/none/a.pt")', ""), HF_HUB_OFFLINE="1")[0].startswith("True|the hub cannot be")


# ---- what cannot be had

def refusal(served, home, name="owner/model", **env):
    code = f"from t2v_turbo.hub import fetch_folder\nprint(told(fetch_folder, {name!r}))"
    return run(served, home, code, **env)[0]


def test_each_refusal_has_its_remedy(served, tmp_path):
    home = tmp_path/"home"
    served.gated.add("owner/model")
    assert f"is gated: accept its terms on {served.url}/owner/model, then `hf auth login`" in refusal(served, home)
    served.gated.clear(); served.private.add("owner/model")
    told = refusal(served, home)
    assert "there is no model 'owner/model' on the hub" in told and "or it is private" in told and "`hf auth login`" in told
    assert "did you mean 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'" in refusal(served, home, "Wan-AI/Wan2.1-T2V-1.3B-Difusers")
    served.status = 503
    assert "the hub answers 503 for 'owner/model': try again later" in refusal(served, home)
    assert "is not in the cache" in refusal(served, home, HF_HUB_OFFLINE="1")


def test_a_hub_that_limits_requests(served, tmp_path):
    "A client of one try, else huggingface_hub waits and tries again for minutes"
    served.status = 429
    assert "(429): wait some minutes, or `hf auth login`" in refusal(served, tmp_path/"home")


def test_without_a_hub(served, tmp_path):
    "The cache serves while the hub is away or busy; half a model in it is not taken for a whole one"
    home = tmp_path/"home"
    whole, _ = fetch(served, home)
    assert fetch(served, home, HF_HUB_OFFLINE="1")[0] == whole
    assert fetch(served, home, HF_ENDPOINT="http://127.0.0.1:9")[0] == whole
    served.status = 503
    assert fetch(served, home)[0] == whole
    next((home/"hub").glob(f"models--owner--model/snapshots/*/unet/{FILE}")).unlink()
    assert "the cache has 'owner/model' without unet: connect" in refusal(served, home, HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached (" in refusal(served, tmp_path/"other", HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize("then", [None, 503])
def test_an_interrupted_download_goes_on(served, tmp_path, then):
    "The connection breaks off in the middle of a file, and perhaps the hub is gone as well; what has come is not sent again"
    file = served.folder/"owner/model/unet"/FILE
    file.write_bytes(bytes(range(256))*100_000)
    served.cut[FILE], served.then = 20_000_000, then
    if then:
        assert "run it again, the files that came whole are kept" in refusal(served, tmp_path/"home")
        served.status = None
    out, _ = fetch(served, tmp_path/"home")
    sent = {f: [n for m, p, s, n in served.log if m == "GET" and p.endswith(f) and s < 300] for f in (FILE, "vocab.json")}
    assert f"unet/{FILE}" in fetched(out) and len(sent[FILE]) == 2 and sent[FILE][0] == 20_000_000 and len(sent["vocab.json"]) == 1
    assert then or sent[FILE][1] < 16_000_000, "the pieces of 10 MB that had come whole are kept"
    got, = (tmp_path/"home/hub").glob(f"models--owner--model/snapshots/*/unet/{FILE}")
    assert got.read_bytes() == file.read_bytes()


def test_a_disk_without_room(served, tmp_path):
    code = """
import shutil
from t2v_turbo import hub
hub.shutil.disk_usage = lambda at: shutil._ntuple_diskusage(9, 9, 9)
print(told(hub.fetch_folder, "owner/model"))
"""
    out, _ = run(served, tmp_path/"home", code)
    assert "needs " in out and "has room for 9 bytes: make room, or set HF_HOME to another disk" in out
    assert [f for f in served.fetched() if "model_index" not in f] == []


def test_a_damaged_index(served, tmp_path):
    (served.folder/"owner/model/model_index.json").write_text('{"unet": [')
    assert "model_index.json' is damaged (no JSON object)" in refusal(served, tmp_path/"home")


def test_bars_are_shown_where_other_libraries_show_none(served, tmp_path):
    "A command switches the bars of transformers off, and with them those of the hub; on a terminal they are there while files come"
    code = """
from transformers.utils import logging
from huggingface_hub.utils import are_progress_bars_disabled
from t2v_turbo import hub
logging.disable_progress_bar()
seen, fetch = [], hub.snapshot_download
hub.snapshot_download = lambda *a, **k: seen.append(are_progress_bars_disabled()) or fetch(*a, **k)
hub.fetch_folder("owner/model")
print(seen, are_progress_bars_disabled())
"""
    assert run(served, tmp_path/"home", code)[0] == "[False] True"


# ---- every loading path of the package

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with hub.serve(hub.repositories(tmp_path_factory.mktemp("hub")/"repos")) as server: yield server


def names(world, repo): return {p.split("/resolve/")[1].partition("/")[2] for m, p, s, n in world.log if m == "GET" and n and f"/{repo}/resolve/" in p}


def test_teachers(world, tmp_path):
    "By the published names, in both precisions; and a student that finds its teacher again by name, without the hub"
    ms = "ali-vilab/text-to-video-ms-1.7b"
    code = f"""
import torch
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.saved import load_student, save_student
from t2v_turbo.student import Student
half = load_teacher("{ms}", dtype=torch.float16, frames=4)
print(half.name, half.denoiser.dtype, half.options, half.tokenizer(["ab"])["input_ids"][0][:3])
save_student(Student(half, rank=2), "{tmp_path}/s")
"""
    out, _ = run(world, tmp_path/"home", code)
    assert out.startswith(f"{ms} torch.float16 {{'frames': 4}}")
    weights = {n for n in names(world, ms) if n.endswith((".safetensors", ".bin", ".msgpack", ".pth"))}
    assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"}
    code = f"""
import torch
from t2v_turbo.teachers.folders import load_teacher
from t2v_turbo.saved import load_student
again = load_teacher("{ms}", frames=4)                     # what there is of it, without a network
print(again.denoiser.dtype, load_student("{tmp_path}/s", load_teacher("{ms}", dtype=torch.float16, frames=4)).teacher.name)
print(told(load_teacher, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
"""
    out, _ = run(world, tmp_path/"home", code, HF_HUB_OFFLINE="1")
    assert out.startswith(f"torch.float32 {ms}") and "there is no folder 'Wan-AI" in out and "cannot be reached (offline)" in out
    code = f"""
from t2v_turbo.teachers.folders import load_teacher
full = load_teacher("{ms}", frames=4)
wan = load_teacher("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", frames=9, size=(32, 32))
print(full.denoiser.dtype, wan.latent_shape)
print(load_teacher("{ms}", variant="fp16", frames=4).options)
"""
    out, _ = run(world, tmp_path/"two", code)
    assert out == "torch.float32 (16, 3, 4, 4)\n{'frames': 4, 'variant': 'fp16'}"
    assert len([n for n in names(world, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") if n.startswith("transformer/diffusion_pytorch_model-")]) > 1
    assert not [n for n in names(world, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") if "assets" in n]


def test_newer_teachers(world, tmp_path):
    "Wan 2.2 TI2V-5B and SANA-Video by their ids; of A14B not one file of weights is fetched"
    code = """
from t2v_turbo.teachers.folders import defaults_of, load_teacher
large, sana = "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"
print(defaults_of(large).guidance, defaults_of(sana).guidance)
for name, size in ((large, (64, 64)), (sana, (32, 64))):
    t = load_teacher(name, frames=9, size=size)
    print(type(t).__name__, t.latent_shape, load_teacher(name).video_shape, t.fps, defaults_of(t) == defaults_of(name))
a14b = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
print(told(load_teacher, a14b)); print(told(defaults_of, a14b))
print(told(load_teacher, "Wan-AI/Wan2.2-TI2V-5B-Diffuser"))
"""
    out, _ = run(world, tmp_path/"home", code)
    first, large, sana, *refused, near = out.splitlines()
    assert first == "5.0 5.0" and large == "WanTeacher (48, 3, 4, 4) (3, 121, 704, 1280) 24 True"
    assert sana == "SanaTeacher (16, 3, 4, 8) (3, 81, 480, 832) 16 True" and "did you mean 'Wan-AI/Wan2.2-TI2V-5B-Diffusers'" in near
    assert len(refused) == 2 and all("has two transformers" in r and "give Wan 2.1 or Wan 2.2 TI2V-5B" in r for r in refused)
    assert names(world, "Wan-AI/Wan2.2-T2V-A14B-Diffusers") == {"model_index.json"}


def test_published_students(world, tmp_path):
    "The list and its base model by their names on the hub, in one command"
    code = f"""
from t2v_turbo.cli import main
print(main(["convert", "lora", "jiachenli-ucsb/T2V-Turbo-MS/unet_lora.pt", "--base", "ms", "{tmp_path}/out"]))
print(main(["convert", "lora", "jiachenli-ucsb/T2V-Turbo-MS/unet_lor.pt", "--base", "ms", "{tmp_path}/other"]))
"""
    out, err = run(world, tmp_path/"home", code)
    assert out.splitlines()[-2:] == ["0", "2"] and (tmp_path/"out/adapter_model.safetensors").is_file()
    assert "fetching jiachenli-ucsb/T2V-Turbo-MS/unet_lora.pt: 1 file, " in err and "did you mean 'unet_lora.pt'?" in err
    assert json.loads((tmp_path/"out/student.json").read_text())["teacher"] == "ali-vilab/text-to-video-ms-1.7b"


def test_rewards(world, tmp_path):
    (tmp_path/"merges.txt").write_text("#version\n")
    code = f"""
import torch
from t2v_turbo.identity import differing, reward_identity
from t2v_turbo.rewards import clip, imagereward, loading, names, viclip
x, words, v = torch.rand(1, 3, 2, 40, 40), ["ab"], "{tmp_path}/merges.txt"
for rm in (clip.hpsv2(vocabulary=v), clip.clipscore(), clip.pickscore(dtype=torch.float32)): print(rm.facts.name, tuple(rm(x, words).shape))
torch.save(dict(weight=torch.ones(1, 24), bias=torch.zeros(1)), "{tmp_path}/head.pth")
print(clip.aesthetic("{tmp_path}/head.pth")(x, words).shape[0])
for facts in (imagereward.IMAGEREWARD, viclip.VICLIP_L): print(loading.fetch(None, facts).name)
print(told(clip.pickscore, "yuvalkirstain/PickScore_v2"))
print(told(loading.tokenizer_of, "google-bert/bert-base-uncased", "imagereward"))
a, b = (reward_identity(r) for r in (clip.clipscore(), clip.hpsv2(vocabulary=v)))
print(differing(a, a), differing(a, b))
"""
    out, _ = run(world, tmp_path/"home", code)
    assert out.splitlines()[:3] == [f"{n} (1,)" for n in ("hpsv2.1", "clipscore", "pickscore")]
    assert out.splitlines()[3:6] == ["1", "ImageReward.pt", "ViClip-InternVid-10M-FLT.pth"]
    assert "did you mean 'yuvalkirstain/PickScore_v1'" in out.splitlines()[6] and "imagereward: no folder 'google-bert" in out.splitlines()[7]
    assert out.splitlines()[8] == "[] ['weights']"
    for repo in ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "yuvalkirstain/PickScore_v1", "openai/clip-vit-large-patch14"):
        assert {n for n in names(world, repo) if not n.endswith((".json", ".txt"))} == {"model.safetensors"}, repo
