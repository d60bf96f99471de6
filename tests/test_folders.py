"Folders of every kind: what they are taken for, what is refused, and one step of the recipe on each"
import json
import re
import shutil

import loras
import pytest
import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel, WanPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from t2v_turbo.core import make_gen
from t2v_turbo.distill import Distillation, Objective, draw
from t2v_turbo.files import UserError
from t2v_turbo.identity import differing, teacher_identity
from t2v_turbo.saved import load_merged, load_student, save_student
from t2v_turbo.schedule import Schedule
from t2v_turbo.solver import DDIM
from t2v_turbo.standins import tiny_modelscope, tiny_videocrafter2, tiny_wan
from t2v_turbo.student import Student
from t2v_turbo.teachers.folders import (
    ScaledSchedule,
    defaults_of,
    in_tiny_world,
    load_teacher,
    local_folder,
)
from t2v_turbo.teachers.loading import dtype_arg
from t2v_turbo.teachers.lora import layer_names, wan_name
from t2v_turbo.teachers.tiny import WEIGHTS
from t2v_turbo.teachers.videocrafter2 import convert_videocrafter2, vc2_scheduler, x0_scale
from t2v_turbo.teachers.wan import save_wan

SMALL = dict(size=(16, 24), frames=3)


@pytest.fixture(scope="session")
def ms(tmp_path_factory): return tiny_modelscope(tmp_path_factory.mktemp("t")/"ms")


@pytest.fixture(scope="session")
def vc2(tmp_path_factory):
    at = tmp_path_factory.mktemp("t")
    torch.save(dict(state_dict=tiny_videocrafter2()), at/"model.ckpt")
    (at/"merges.txt").write_text("#version\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n")
    return convert_videocrafter2(at/"model.ckpt", at/"vc2", 16, at/"merges.txt")


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def test_modelscope(ms):
    t = load_teacher(ms)
    assert t.video_shape == (3, 16, 32, 32) and t.latent_shape == (4, 16, 4, 4)
    assert (t.fps, t.prediction_type, t.options) == (8, "epsilon", {})
    assert isinstance(t.denoiser, UNet3DConditionModel) and not t.denoiser.training
    assert not t.denoiser.time_embedding.cond_proj.weight.any()
    assert t.tokenizer.pad_token_id == t.tokenizer.eos_token_id and t.tokenizer.model_max_length == 77
    stock = UNet3DConditionModel.from_pretrained(ms/"unet").eval()
    gen = make_gen(0)
    x, ctx, time = torch.randn(2, *t.latent_shape, generator=gen), t.encode_text(["a", "b"]), torch.tensor([19, 999])
    assert ctx.shape == (2, 77, 32)
    with torch.no_grad(): want, (_, eps) = stock(x, time, ctx).sample, t.denoise(x, time, ctx)
    torch.testing.assert_close(eps, want)
    frames = torch.rand(1, 3, 2, 32, 32, generator=gen)
    with torch.no_grad(): latent = t.vae.encode(frames[:, :, 1]*2 - 1).latent_dist.mean*.18215
    torch.testing.assert_close(t.encode(frames)[:, :, 1], latent)
    same = load_teacher(ms)
    assert same.fingerprint() == t.fingerprint()
    assert tiny_modelscope(ms.parent/"other", 1) and load_teacher(ms.parent/"other").fingerprint() != t.fingerprint()


def test_published_names_of_the_tokenizer_are_read(ms, tmp_path):
    "The published folder has vocab.json and merges.txt, newer ones tokenizer.json"
    folder = copy(ms, tmp_path/"ms")
    one = json.loads((folder/"tokenizer/tokenizer.json").read_text())["model"]
    (folder/"tokenizer/tokenizer.json").unlink()
    (folder/"tokenizer/vocab.json").write_text(json.dumps(one["vocab"]))
    (folder/"tokenizer/merges.txt").write_text("#version: 0.2\n")
    config = json.loads((folder/"tokenizer/tokenizer_config.json").read_text())
    config.pop("model_max_length")                      # then it would be 10**30
    (folder/"tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    a, b = load_teacher(folder), load_teacher(ms)
    torch.testing.assert_close(a.encode_text(["ab"]), b.encode_text(["ab"]))


def test_videocrafter2_and_its_frame_rate(vc2):
    bias = lambda t: t.denoiser.time_embedding.linear_2.bias
    own, at16, at8 = (load_teacher(vc2, **SMALL, **k) for k in ({}, dict(fps=16), dict(fps=8)))
    assert own.fps == 16 and own.video_shape == (3, 3, 16, 24) and at8.fps == 8
    assert torch.equal(bias(own), bias(at16)) and not torch.equal(bias(own), bias(at8))
    assert at8.options == dict(SMALL, fps=8)
    assert load_teacher(vc2, frames=1).video_shape == (3, 1, 320, 512)
    with pytest.raises(UserError, match="nearest is 8"): load_teacher(vc2, fps=8.4)
    with pytest.raises(UserError, match="nearest is 1"): load_teacher(vc2, fps=0)


def test_fps_without_its_file_is_refused(vc2, tmp_path):
    folder = copy(vc2, tmp_path/"vc2")
    (folder/"fps_embedding.safetensors").unlink()
    with pytest.raises(UserError, match="frame rate cannot be changed"): load_teacher(folder, fps=8)
    assert load_teacher(folder, **SMALL).fps == 16


@pytest.mark.parametrize("more, words", [
    (dict(size=(30, 32)), "nearest is 32x32"), (dict(size=(32, 3)), "nearest is 32x8"),
    (dict(size=(32,)), "height and width"), (dict(frames=0), "nearest is 1"), (dict(frames=2.6), "nearest is 3"),
    (dict(fps=-1), "nearest is 1"), (dict(scale_x0=True), "VideoCrafter2 only")])
def test_what_modelscope_cannot_take(ms, more, words):
    with pytest.raises(UserError, match=words): load_teacher(ms, **more)


@pytest.mark.parametrize("more", [dict(frames=9), dict(size=(32, 32)), dict(fps=7)])
def test_what_the_tiny_teacher_cannot_take(more):
    with pytest.raises(UserError, match="is not possible"): load_teacher("tiny", **more)
    assert load_teacher("tiny", frames=8, size=[64, 64], fps=8).video_shape == (3, 8, 64, 64)


def test_a_tiny_teacher_without_all_its_tensors(tmp_path):
    "Not filled up with random ones"
    at = tmp_path/"t"
    shutil.copytree(WEIGHTS/"tiny", at)
    file, = (at/"denoiser").glob("*.safetensors")
    held = load_file(file)
    gone = sorted(held)[0]
    save_file({k: v for k, v in held.items() if k != gone}, file, dict(format="pt"))
    with pytest.raises(UserError, match=f"does not have the tensors of a TinyVideoDenoiser: 1 missing .{re.escape(gone)}."): load_teacher(at)


def test_what_is_no_teacher(ms, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a diffusers model"): load_teacher(tmp_path)
    (tmp_path/"model.ckpt").touch()
    with pytest.raises(UserError, match="convert videocrafter2"): load_teacher(tmp_path/"model.ckpt")
    with pytest.raises(UserError, match="no folder 'no-such'"): load_teacher("no-such")
    other = copy(ms, tmp_path/"other")
    config = json.loads((other/"unet/config.json").read_text())
    (other/"unet/config.json").write_text(json.dumps(config | dict(_class_name="UNet2DModel")))
    with pytest.raises(UserError, match="holds a UNet2DModel"): load_teacher(other)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        folder = copy(ms, tmp_path/part)
        shutil.rmtree(folder/part)
        with pytest.raises(UserError, match=f"has no {part}/"): load_teacher(folder)


def test_pickles_and_broken_files_are_refused(ms, tmp_path):
    "A .bin of tensors is read; one with code beside them is not, and nothing in it runs"
    folder = copy(ms, tmp_path/"bin")
    for file in [*folder.glob("*/*.safetensors")]:
        name = "pytorch_model.bin" if file.parent.name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    a, b = load_teacher(folder), load_teacher(ms)
    assert teacher_identity(a) == teacher_identity(b)
    file = folder/"unet/diffusion_pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | dict(code=Runs(tmp_path/"ran")), file)
    with pytest.raises(UserError, match="holds more than tensors"): load_teacher(folder)
    assert not (tmp_path/"ran").exists()
    folder = copy(ms, tmp_path/"cut")
    file = folder/"vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded as a AutoencoderKL"): load_teacher(folder)


class Runs:
    "Makes a file where a pickle is executed"
    def __init__(self, path): self.path = path
    def __reduce__(self): return type(self.path).touch, (self.path,)


def test_variants_of_the_weights(ms, tmp_path):
    "float16 takes the files of that precision; alone they serve for all"
    folder = copy(ms, tmp_path/"ms")
    for file in [*folder.glob("*/*.safetensors")]:
        half = {k: (v.half() if v.is_floating_point() else v)*2 for k, v in load_file(file).items()}   # so that one can tell
        save_file(half, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), dict(format="pt"))
    bias = lambda t: t.denoiser.conv_in.bias
    full, half, named = load_teacher(folder), load_teacher(folder, dtype=torch.float16), load_teacher(folder, variant="fp16")
    assert torch.equal(bias(half), 2*bias(full).half()) and torch.equal(bias(named), bias(half).float())
    assert named.options == dict(variant="fp16") and half.options == {}
    assert torch.equal(bias(load_teacher(folder, dtype=torch.bfloat16)), bias(full).bfloat16())
    for file in folder.glob("*/*.safetensors"):
        if "fp16" not in file.name: file.unlink()
    assert torch.equal(bias(load_teacher(folder)), bias(half).float())


def edit(path, **changes):
    config = json.loads(path.read_text())
    for k, v in changes.items(): config.pop(k) if v is None else config.update({k: v})
    path.write_text(json.dumps(config))


CONFIGS = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
           "teacher.json", "model_index.json"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"words"', "null", '{"a": 1}{', "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "\ufeff\x00"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_configuration_is_one_sentence(ms, tmp_path, name, text):
    folder = copy(ms, tmp_path/"ms")
    (folder/name).write_text(text)
    with pytest.raises(UserError, match=f"{name}. is (damaged|a Git LFS pointer)"): load_teacher(folder)


@pytest.mark.parametrize("name, changes, words", [
    ("unet/config.json", dict(_class_name=None), "lacks the name of its class"), ("unet/config.json", dict(_class_name=3), "lacks the name"),
    ("unet/config.json", dict(attention_head_dim=None), "lacks attention_head_dim"), ("unet/config.json", dict(sample_size="4"), "sample_size is '4'"),
    ("unet/config.json", dict(block_out_channels="x"), "block_out_channels is 'x'"), ("unet/config.json", dict(block_out_channels=[]), "cannot be|do not make"),
    ("unet/config.json", dict(norm_num_groups=7), "cannot be loaded"), ("unet/config.json", dict(cross_attention_dim=64), "of another shape"),
    ("vae/config.json", dict(scaling_factor="big"), "scaling_factor is 'big'"), ("vae/config.json", dict(scaling_factor=0), "do not make a teacher"),
    ("vae/config.json", dict(scaling_factor=True), "scaling_factor is True"), ("vae/config.json", dict(latent_channels=None), "lacks latent_channels"),
    ("text_encoder/config.json", dict(num_attention_heads=None), "lacks num_attention_heads"), ("text_encoder/config.json", dict(hidden_act=None), "lacks hidden_act"),
    ("text_encoder/config.json", dict(hidden_size="32"), "hidden_size is '32'"), ("text_encoder/config.json", dict(vocab_size=100), "of another shape|has ids up to"),
    ("scheduler/scheduler_config.json", dict(beta_start=None), "lacks beta_start"), ("scheduler/scheduler_config.json", dict(beta_end=".012"), "beta_end is '.012'"),
    ("scheduler/scheduler_config.json", dict(beta_schedule="odd"), "cannot be loaded as a DDIMScheduler"),
    ("scheduler/scheduler_config.json", dict(num_train_timesteps=[1]), "cannot be loaded|do not make")])
def test_a_configuration_of_another_kind(ms, tmp_path, name, changes, words):
    "What the libraries would fill with a default, or stumble over later"
    folder = copy(ms, tmp_path/"ms")
    edit(folder/name, **changes)
    with pytest.raises(UserError, match=words): load_teacher(folder)


@pytest.mark.parametrize("about", [dict(frames="16"), dict(fps=[8]), dict(size="32x32"), dict(size=[32]), dict(size=[32, None]), dict(frames=True), dict(frames=0)])
def test_a_damaged_teacher_json(ms, tmp_path, about):
    folder = copy(ms, tmp_path/"ms")
    (folder/"teacher.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="is damaged|is not possible"): load_teacher(folder)
    tiny = copy(WEIGHTS/"tiny", tmp_path/"tiny")
    (tiny/"teacher.json").write_text("{}")
    with pytest.raises(UserError, match="does not tell frames and fps"): load_teacher(tiny)


def no_words(folder):
    for f in (folder/"tokenizer").iterdir():
        if f.name != "tokenizer_config.json": f.unlink()


def empty_words(folder):
    file = folder/"tokenizer/tokenizer.json"
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    special = [t["content"] for t in told["added_tokens"]]
    told["model"]["vocab"] = ([w for w in vocab if w[0] in special] if isinstance(vocab, list) else {w: i for w, i in vocab.items() if w in special})
    file.write_text(json.dumps(told))


def no_merges(folder):
    file = folder/"tokenizer/tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["merges"] = []
    file.write_text(json.dumps(told))


@pytest.mark.parametrize("spoil", [no_words, empty_words])
@pytest.mark.parametrize("name", ["ms", "wan", "tiny"])
def test_a_tokenizer_without_words_is_refused(ms, tmp_path, name, spoil):
    "CLIP's, UMT5's and the tiny one: every caption would become the same tokens"
    folder = tmp_path/name
    if name == "wan": save_wan(tiny_wan(), folder)
    else: copy(ms if name == "ms" else WEIGHTS/"tiny", folder)
    load_teacher(folder, frames=dict(ms=4, wan=9, tiny=8)[name])
    spoil(folder)
    with pytest.raises(UserError, match="tokenizer"): load_teacher(folder, frames=dict(ms=4, wan=9, tiny=8)[name])


def test_a_tokenizer_without_its_merges_is_refused(vc2, tmp_path):
    "It would spell every word in letters, which the text encoder never read"
    folder = copy(vc2, tmp_path/"vc2")
    no_merges(folder)
    with pytest.raises(UserError, match="splits or drops its own words"): load_teacher(folder, **SMALL)


def test_pointers_instead_of_weights(ms, tmp_path):
    folder = copy(ms, tmp_path/"ms")
    for file in folder.glob("*/*.safetensors"): file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="is a Git LFS pointer, not the file itself: run `git lfs pull`"): load_teacher(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_file_where_a_folder_is_meant(ms, tmp_path, part):
    folder = copy(ms, tmp_path/"ms")
    shutil.rmtree(folder/part); (folder/part).write_text("")
    with pytest.raises(UserError, match=f"no {part}/|not a diffusers model"): load_teacher(folder)


def test_names_that_are_no_names_of_the_hub(tmp_path):
    "Refused without asking anybody; a misspelt preset is named"
    for name, words in (("tny", "did you mean 'tiny'"), ("tiny_flow", "did you mean 'tiny-flow'"), ("./no", "give .tiny."), ("a/b/c", "or a hub id")):
        with pytest.raises(UserError, match=f"there is no folder '{name}'.*{words}"): load_teacher(name)


def test_a_folder_that_a_killed_writer_moved_aside(ms, tmp_path, monkeypatch):
    "Killed between the two renames: the old folder is there under another name, and every reader brings it back"
    monkeypatch.chdir(tmp_path)
    for read in (load_teacher, lambda n: local_folder(str(n)), lambda n: defaults_of(str(n)), lambda n: in_tiny_world(str(n))):
        for name in (tmp_path/"runs/m", "runs/m"):       # the second might be a name on the hub
            copy(ms, tmp_path/"runs/.tmp-old-m")
            read(name)
            assert not (tmp_path/"runs/.tmp-old-m").exists() and (tmp_path/"runs/m/unet/config.json").is_file()
            shutil.rmtree(tmp_path/"runs")


def test_identity(ms, tmp_path):
    "Every part counts, and every value of it; the folder's name does not"
    load = lambda f: teacher_identity(load_teacher(f, frames=4))
    own = load(ms)
    assert load(copy(ms, tmp_path/"same")) == own == json.loads(json.dumps(own))
    for part, key in (("unet", "denoiser"), ("vae", "vae"), ("text_encoder", "text_encoder")):
        folder = copy(ms, tmp_path/part)
        file, = (folder/part).glob("*.safetensors")
        state = load_file(file)
        k = max(state, key=lambda k: state[k].numel())
        state[k].view(-1)[state[k].numel()//2 + 1] += 1
        save_file(state, file, dict(format="pt"))
        assert differing(own, load(folder)) == [key]
    for name, change, key in (("vae/config.json", dict(scaling_factor=.2), "scale"), ("scheduler/scheduler_config.json", dict(beta_end=.02), "schedule"),
                              ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction"), "schedule")):
        folder = copy(ms, tmp_path/f"{key}{len(str(change))}")
        edit(folder/name, **change)
        assert differing(own, load(folder)) == [key]
    half = teacher_identity(load_teacher(ms, frames=4, dtype=torch.float16))
    assert differing(own, half) == [] and differing(teacher_identity(load_teacher(ms, frames=4, dtype=torch.bfloat16)), half) == ["denoiser", "vae", "text_encoder"]
    assert differing(own, {k: v for k, v in own.items() if k != "vae"}) == ["vae"]
    teacher = load_teacher(ms, frames=4)
    Student(teacher, rank=2)
    assert teacher_identity(teacher) == own, "adapters do not count"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ms", "vc2", "tiny"])
def test_half_precision(name, dtype, request):
    "Weights in half, latents and predictions in single precision, and about the same numbers"
    at = name if name == "tiny" else request.getfixturevalue(name)
    more = SMALL if name == "vc2" else {}
    half, full = load_teacher(at, dtype=dtype, **more), load_teacher(at, **more)
    assert {p.dtype for p in half.vae.parameters()} == {dtype} and half.denoiser.dtype == dtype
    gen = make_gen(0)
    clip, t = torch.rand(1, *half.video_shape, generator=gen), torch.tensor([499])
    got, want = [], []
    for model, out in ((half, got), (full, want)):
        with torch.no_grad():
            z, ctx = model.encode(clip), model.encode_text(["a red fish"])
            zt = model.schedule.add_noise(want[0] if want else z, torch.ones_like(z), t)
            out += [z, ctx, *model.denoise(zt, t, ctx), model.decode(z)]
    assert {v.dtype for i, v in enumerate(got) if i != 1} == {torch.float32}
    for i, (a, b) in enumerate(zip(got, want)):
        if i in (2, 3): continue                       # their inputs differ
        assert (a.float() - b).norm()/b.norm() < .05, i


def test_scaled_schedule(vc2):
    on, off = (load_teacher(vc2, scale_x0=v, **SMALL) for v in (True, False))
    assert type(off.schedule) is Schedule and on.options["scale_x0"] is True and "scale_x0" not in off.options
    s, t = x0_scale(), torch.tensor([0, 199, 399, 999])
    z, e = torch.ones(4, 1), torch.zeros(4, 1)
    torch.testing.assert_close((on.schedule.add_noise(z, e, t)/off.schedule.add_noise(z, e, t))[:, 0], s[t])
    noise = torch.randn(4, 1, generator=make_gen(0))
    zt = on.schedule.add_noise(z, noise, t)
    torch.testing.assert_close(on.schedule.x0_from_eps(zt, noise, t), z, rtol=1e-3, atol=1e-3)
    moved = on.schedule.to("cpu")
    assert isinstance(moved, ScaledSchedule) and torch.equal(moved.scale, s) and len(moved) == 1000
    abar = vc2_scheduler().alphas_cumprod
    x0, eps = torch.full((1, 1), 2.), torch.full((1, 1), 3.)
    got = DDIM(on.schedule, 50).step(x0, eps, torch.tensor([30]))       # from 619 to 599
    torch.testing.assert_close(got, abar[599].sqrt()*.7*x0 + (1 - abar[599]).sqrt()*eps)


@pytest.mark.parametrize("name", ["ms", "vc2"])
def test_one_step_of_the_recipe_and_a_saved_student(name, request, tmp_path):
    "Distillation runs on a UNet teacher as on any; the student comes back with the same options"
    at = request.getfixturevalue(name)
    options = dict(size=(16, 24), frames=3, fps=8) if name == "vc2" else dict(frames=3)
    teacher = load_teacher(at, **options)
    student = Student(teacher, rank=2)
    cfg = Objective(beta_img=0, beta_vid=0, image_frames=1, video_frames=1)
    model, gen = Distillation(student, cfg), make_gen(0)
    ctx, null = teacher.encode_text(["a", "b"]), teacher.encode_text(["", ""])
    z0 = torch.randn(2, *teacher.latent_shape, generator=gen)
    d = draw(cfg, z0.shape, gen)
    params = student.trainable()
    opt = torch.optim.AdamW(params.values(), 1e-2)
    before = {n: p.detach().clone() for n, p in params.items()}
    losses = []
    for _ in range(3):
        out = model(z0, ctx, null, ["a", "b"], d)
        out.loss.mean().backward()
        losses.append(out.loss.mean().item())
        assert all(p.grad is not None for p in params.values())
        opt.step(); opt.zero_grad()
    assert all(0 < v < 10 for v in losses) and any("cond_proj" in n for n in params)
    assert all(not torch.equal(before[n], p) for n, p in params.items() if "lora_B" in n)
    save_student(student, tmp_path/"s")
    assert json.loads((tmp_path/"s/student.json").read_text())["options"] == json.loads(json.dumps(options))
    again = load_student(tmp_path/"s")
    assert again.teacher.video_shape == teacher.video_shape and again.teacher.fps == teacher.fps
    t, w = torch.tensor([999, 19]), torch.tensor([4., 7.5])
    with torch.no_grad():
        torch.testing.assert_close(again(z0, t, ctx, w), student(z0, t, ctx, w))


@pytest.mark.parametrize("part, cls", [("unet", "UNet3DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")])
def test_a_part_that_is_not_whole_is_refused(ms, tmp_path, part, cls):
    "The libraries would fill a missing tensor with random numbers; each difference is counted and named"
    folder = copy(ms, tmp_path/"ms")
    file = next((folder/part).glob("*.safetensors"))
    state = load_file(file)
    gone, odd = sorted(state)[2:4]
    shape = tuple(state.pop(gone).shape), tuple(state[odd].shape)
    save_file(state | {odd: torch.zeros(*shape[1], 1), "extra.bias": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as e: load_teacher(folder)
    assert (f"of a {cls}: 1 missing ({gone}), 1 unknown (extra.bias), 1 of another shape ({odd} is {(*shape[1], 1)}, not "
            f"{shape[1]})") in str(e.value)


def test_folders_of_older_versions_are_whole(ms, tmp_path):
    "ModelScopeT2V as published: older names in the VAE's attention, a buffer and a prefix in the text encoder"
    folder, names = copy(ms, tmp_path/"ms"), dict(to_q="query", to_k="key", to_v="value", to_out="proj_attn")
    file = folder/"vae/diffusion_pytorch_model.safetensors"
    def old(k):
        for a, b in names.items(): k = k.replace(f"attentions.0.{a}", f"attentions.0.{b}")
        return k.replace("proj_attn.0", "proj_attn")
    state = {old(k): v for k, v in load_file(file).items()}
    assert any("proj_attn.weight" in k for k in state)
    save_file(state, file, metadata={"format": "pt"})
    file = folder/"text_encoder/model.safetensors"
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file, metadata={"format": "pt"})
    a, b = load_teacher(folder), load_teacher(ms)
    for n in ("vae", "text_encoder"):
        for (k, v), w in zip(getattr(a, n).state_dict().items(), getattr(b, n).state_dict().values()): assert torch.equal(v, w), k


# ---- a teacher with LoRA

@pytest.fixture(scope="session")
def wan(tmp_path_factory): return save_wan(tiny_wan(), tmp_path_factory.mktemp("t")/"wan")


def close(net, want, atol=1e-5):
    "The weights of a network, without the w-projection; and how far they are from those of the plain teacher"
    own = {k: v for k, v in net.state_dict().items() if "cond_proj" not in k}
    assert own.keys() == want.keys()
    for k, v in want.items(): torch.testing.assert_close(own[k], v, atol=atol, rtol=0, msg=lambda m: f"{k}: {m}")


def stock_wan(folder, file, strength, dtype=torch.float32):
    "What diffusers makes of a file, in PEFT's naming what PEFT makes of it, which diffusers does not read"
    pipe = WanPipeline.from_pretrained(folder, **dtype_arg(WanPipeline, dtype))
    if file.name != "adapter_model.safetensors":
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora(lora_scale=strength); pipe.unload_lora_weights()
        return pipe.transformer.state_dict()
    net = PeftModel.from_pretrained(pipe.transformer, file.parent)
    for m in net.modules():
        if isinstance(m, LoraLayer): m.scale_layer(strength)
    return net.merge_and_unload().state_dict()


@pytest.mark.parametrize("strength", [1., .7])
@pytest.mark.parametrize("how", ["diffusers", "peft", "kohya", "comfyui"])
def test_a_style_in_four_namings_is_what_the_library_fuses(wan, tmp_path, how, strength):
    plain = load_teacher(wan)
    file, _ = loras.write(loras.random_lora(plain.denoiser, loras.in_blocks(plain.denoiser)), how, tmp_path/how, plain.denoiser)
    t = load_teacher(wan, teacher_lora=f"{file}={strength}")
    close(t.denoiser, stock_wan(wan, file, strength))
    moved = [k for k, v in t.denoiser.state_dict().items() if not torch.equal(v, plain.denoiser.state_dict()[k])]
    assert len(moved) == len(loras.in_blocks(plain.denoiser)) == 20 and not any(p.requires_grad for p in t.denoiser.parameters())
    assert t.options == dict(teacher_lora=f"{file}={strength!r}") and not hasattr(t.denoiser, "peft_config")
    x, ctx, time = torch.randn(1, *t.latent_shape, generator=make_gen(0)), t.encode_text(["a cat"]), torch.tensor([500])
    with torch.no_grad(): far = (t.denoise(x, time, ctx)[0] - plain.denoise(x, time, ctx)[0]).abs().max()
    assert far > 1e-2


def test_a_style_in_bfloat16_is_what_the_library_fuses(wan, tmp_path):
    net = load_teacher(wan).denoiser
    file, _ = loras.write(loras.random_lora(net, loras.in_blocks(net)), "diffusers", tmp_path/"s", net)
    got = load_teacher(wan, dtype=torch.bfloat16, teacher_lora=str(file)).denoiser
    close(got, stock_wan(wan, file, 1., torch.bfloat16), 0)


class WithLora(UNet3DConditionModel, PeftAdapterMixin):
    "What diffusers' own UNet lacks"


def stock_unet(folder, file, strength):
    pipe = TextToVideoSDPipeline.from_pretrained(folder)
    with pytest.raises(AttributeError): pipe.load_lora_weights(file.parent, weight_name=file.name)    # diffusers has no LoRA of video UNets
    pipe.unet.__class__ = WithLora
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.unet.fuse_lora(lora_scale=strength); pipe.unet.unload_lora()
    return pipe.unet.state_dict()


def layers_of(unet, how):
    "Attention in space and in time, and convolutions; diffusers' old names exist for attention in space only"
    found = [n for n, m in unet.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1 and not n.endswith("cond_proj")]
    return [n for n in found if "transformer_blocks" in n] if how == "old_diffusers" else found


@pytest.mark.parametrize("base, how", [(b, h) for b in ("ms", "vc2") for h in loras.NAMINGS if (b, h) != ("ms", "comfyui")])
def test_a_style_of_a_video_unet(request, tmp_path, base, how):
    "W + strength alpha/r B A, which diffusers makes, too, once its UNet has its mixin, of the names that it reads"
    folder = request.getfixturevalue(base)
    plain = load_teacher(folder, **(SMALL if base == "vc2" else {})).denoiser
    lora = loras.random_lora(plain, layers_of(plain, how))
    file, factor = loras.write(lora, how, tmp_path/how, plain, "unet")
    got = load_teacher(folder, teacher_lora=f"{file}=.7", **(SMALL if base == "vc2" else {})).denoiser
    want = {k: v for k, v in plain.state_dict().items() if "cond_proj" not in k}
    for n, (a, b) in lora.items():
        want[f"{n}.weight"] = want[f"{n}.weight"] + .7*factor*(b.flatten(1) @ a.flatten(1)).view_as(want[f"{n}.weight"])
    close(got, want)
    assert type(got) is UNet3DConditionModel and len(lora) > 30
    if how in ("diffusers", "old_diffusers"): close(got, stock_unet(folder, file, .7))


def test_names_of_wan_are_those_that_diffusers_converts():
    net = tiny_wan().denoiser
    for n in {*layer_names(net).values()}:
        assert [*convert_wan_transformer_to_diffusers({f"{wan_name(n)}.weight": torch.zeros(2, 2)})] == [f"{n}.weight"]


def test_a_file_of_few_layers_with_changes_of_bias(wan, tmp_path):
    "kohya's with one layer, where diffusers requires all; ComfyUI's with `diff_b`, and norms that are zero"
    net, n = load_teacher(wan).denoiser, "blocks.1.attn2.to_out.0"
    lora = loras.random_lora(net, [n])
    file, factor = loras.write(lora, "kohya", tmp_path/"one", net)
    with pytest.raises(KeyError): stock_wan(wan, file, 1.)
    got, (a, b) = load_teacher(wan, teacher_lora=str(file)).denoiser.state_dict(), lora[n]
    torch.testing.assert_close(got[f"{n}.weight"], net.state_dict()[f"{n}.weight"] + factor*b @ a)
    shift = torch.randn(24, generator=make_gen(1))
    save_file({f"diffusion_model.{wan_name(n)}.diff_b": shift, "diffusion_model.blocks.0.norm3.diff": torch.zeros(24)}, tmp_path/"b.safetensors")
    got = load_teacher(wan, teacher_lora=f"{tmp_path}/b.safetensors=-2").denoiser.state_dict()
    torch.testing.assert_close(got[f"{n}.bias"], net.state_dict()[f"{n}.bias"] - 2*shift)


def test_two_styles_add_up(wan, tmp_path):
    net = load_teacher(wan).denoiser
    files = [loras.write(loras.random_lora(net, loras.in_blocks(net), seed), how, tmp_path/how, net)[0]
             for seed, how in enumerate(("diffusers", "comfyui"))]
    both, (a, b) = load_teacher(wan, teacher_lora=f"{files[0]}=.5,{files[1]}"), (load_teacher(wan, teacher_lora=f"{f}={s}") for f, s in zip(files, (.5, 1)))
    own, (own_a, own_b) = net.state_dict(), (t.denoiser.state_dict() for t in (a, b))
    close(both.denoiser, {k: own_a[k] + own_b[k] - own[k] for k in own if "cond_proj" not in k})
    assert len({json.dumps(t.fingerprints()) for t in (both, a, b, load_teacher(wan))}) == 4


def test_the_identity_of_a_fused_teacher(wan, tmp_path):
    "The same for the same LoRA under any names and in any place; another for another strength; comparable in every precision"
    net = load_teacher(wan).denoiser
    lora = loras.random_lora(net, loras.in_blocks(net))
    kohya, comfy = (loras.write(lora, how, tmp_path/how, net)[0] for how in ("kohya", "comfyui"))
    t, same, weak = (load_teacher(wan, teacher_lora=text) for text in (str(kohya), f"{comfy}=1", f"{kohya}=.9"))
    half = load_teacher(wan, teacher_lora=str(kohya), dtype=torch.bfloat16)
    assert t.fingerprints() == same.fingerprints() and differing(teacher_identity(t), teacher_identity(same)) == []
    assert differing(teacher_identity(t), teacher_identity(half)) == [] and differing(teacher_identity(t), teacher_identity(weak)) == ["denoiser"]
    assert differing(teacher_identity(t), teacher_identity(load_teacher(wan))) == ["denoiser"]
    with torch.no_grad():                             # another machine may add up with another rounding
        for p in same.denoiser.parameters(): p.mul_(1 + 1e-7)
    assert t.fingerprints() == same.fingerprints()


def test_a_student_keeps_the_lora_of_its_teacher(wan, tmp_path):
    net = load_teacher(wan).denoiser
    lora = loras.random_lora(net, loras.in_blocks(net))
    file = loras.write(lora, "comfyui", tmp_path/"s", net)[0]
    student = Student(load_teacher(wan, teacher_lora=f"{file}=.7"), 2)
    with torch.no_grad():
        for p in student.trainable().values(): p.normal_(generator=make_gen(3)).mul_(.1)
    save_student(student, tmp_path/"student")
    args = torch.randn(1, *student.teacher.latent_shape, generator=make_gen(0)), torch.tensor([500]), student.teacher.encode_text(["a"]), torch.tensor([3.])
    with torch.no_grad(): want, got = student(*args), load_student(tmp_path/"student")(*args)
    assert torch.equal(got, want)
    merged = load_merged(tmp_path/"student", torch.float32)
    assert not hasattr(merged.teacher.denoiser, "fused_ids")
    with torch.no_grad(): torch.testing.assert_close(merged(*args), want, atol=1e-5, rtol=1e-4)
    load_student(tmp_path/"student", dtype=torch.bfloat16)
    file.rename(tmp_path/"moved.safetensors")
    with pytest.raises(UserError, match="has a LoRA, and no LoRA file '.*style.safetensors'.*; a file that has moved is given as teacher_lora"): load_student(tmp_path/"student")
    assert torch.equal(load_student(tmp_path/"student", teacher_lora=f"{tmp_path}/moved.safetensors=.7")(*args), want)
    for other in ("", f"{tmp_path}/moved.safetensors=.8"):
        with pytest.raises(UserError, match="belongs to another teacher .*: give the model and the LoRA"): load_student(tmp_path/"student", teacher_lora=other)


@pytest.mark.parametrize("spoil, says", [
    (lambda d, net: loras.write(loras.random_lora(UNet3DConditionModel.from_pretrained(d/"ms/unet"), ["conv_in"]), "diffusers", d, net, "unet"),
     "is not a LoRA for '.*wan' .1 unknown|unknown .unet.conv_in"),
    (lambda d, net: save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, d/"style.safetensors"), "without parts for a text encoder"),
    (lambda d, net: save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, d/"style.safetensors"), "1 incomplete or of another shape .blocks.0.attn1.to_q"),
    (lambda d, net: save_file({f"transformer.blocks.0.attn1.to_q.lora_{k}.weight": torch.ones(s) for k, s in (("A", (2, 1536)), ("B", (1536, 2)))}, d/"style.safetensors"),
     "has layers such as .*(24, 24).*: give a plain LoRA that was trained on this model"),
    (lambda d, net: save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(24)}, d/"style.safetensors"), "1 unknown .diffusion_model.blocks.0.norm3.diff"),
    (lambda d, net: save_file({"x": torch.ones(1)}, d/"style.safetensors"), "1 unknown .x"),
    (lambda d, net: save_file({}, d/"style.safetensors"), "it holds none"),
    (lambda d, net: (d/"style.safetensors").write_bytes(b"12345678"), "cannot be read as safetensors")],
    ids="of_a_unet text_encoder half_a_pair of_14b norms no_lora empty torn".split())
def test_what_is_no_lora_of_this_teacher(wan, ms, tmp_path, spoil, says, monkeypatch):
    "Before any weights are loaded"
    (tmp_path/"ms").symlink_to(ms)
    spoil(tmp_path, tiny_wan().denoiser)
    def never(*args, **kw): raise AssertionError("weights were loaded")
    monkeypatch.setattr("t2v_turbo.teachers.folders.loader_of", never)
    with pytest.raises(UserError, match=says): load_teacher(wan, teacher_lora=f"{tmp_path}/style.safetensors")


def test_a_lora_on_the_hub(wan, tmp_path, monkeypatch):
    "Its name stays in the options, so that a student finds it on another machine"
    net = load_teacher(wan).denoiser
    file, _ = loras.write(loras.random_lora(net, loras.in_blocks(net)), "kohya", tmp_path/"s", net)
    asked = []
    monkeypatch.setattr("t2v_turbo.teachers.loading.fetch_file", lambda name: asked.append(name) or file)
    t = load_teacher(wan, teacher_lora="me/mine/style.safetensors=.5")
    assert asked == ["me/mine/style.safetensors"] and t.options == dict(teacher_lora="me/mine/style.safetensors=0.5")
    assert t.fingerprints() == load_teacher(wan, teacher_lora=f"{file}=.5").fingerprints()
