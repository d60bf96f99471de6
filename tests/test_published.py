"The published weights: names, files, conversion, and what is refused"
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet3DConditionModel
from golden_files import FOLDER
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2v_turbo.consistency import w_embedding
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.saved import read_tensors
from t2v_turbo.standins import tiny_videocrafter2
from t2v_turbo.teachers.base import Teacher
from t2v_turbo.teachers.published import (
    COND,
    FPS,
    FPS_FILE,
    convert_lora,
    convert_merged,
    layer_shapes,
    load_fps,
    load_unet,
    lora_config,
    lora_order,
    merge_lora,
    name_lora,
    read_lora,
    to_peft,
    update_of,
    w_weight,
    with_w_projection,
)
from t2v_turbo.teachers.videocrafter2 import convert_videocrafter2, fps_bias, set_fps, unet_from_vc2


def files(prefix): return sorted(FOLDER.glob(f"{prefix}_*.safetensors")) if FOLDER.is_dir() else []
def cases(prefix): return pytest.mark.parametrize("path", files(prefix), ids=lambda p: p.name)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def near(got, want, rtol=1e-4):
    assert got.shape == want.shape
    assert relative(got, want) < rtol, f"relative error {relative(got, want):.2e}"


def metadata(path):
    with safe_open(path, "pt") as f: return f.metadata()


def under(d, prefix): return {k[len(prefix):]: v for k, v in d.items() if k.startswith(prefix)}


def the_fps(v):
    assert len(set(v.flatten().tolist())) == 1, "one frame rate per file"
    return int(v.flatten()[0])


def vc2_student(path):
    "The same for VideoCrafter2, and its fps MLP; the bias holds the file's fps"
    d = load_file(path)
    state = under(d, "unet.") | under(d, "student.")
    config, new = unet_from_vc2(state, the_fps(d["io.fps"]))
    unet = UNet3DConditionModel.from_config(config).eval()
    unet.load_state_dict(new)
    mlp = {k: v for k, v in state.items() if k.startswith(("fps_embedding.", "time_embed.2.bias"))}
    return d, unet, name_lora(read_lora(path.parent/metadata(path)["lora_file"]), unet, "vc2"), mlp


@torch.no_grad()
def run(unet, d, cond=True):
    cond = d["io.w_embedding"] if cond else None
    return unet(d["io.x"], d["io.t"], d["io.context"], timestep_cond=cond).sample


@cases("vc2_unet")
def test_vc2_through_files(path, tmp_path):
    "Base folder, list -> adapters or merged model; both give the recorded student"
    d, unet, named, mlp = vc2_student(path)
    near_w = {"time_cond_proj.weight": d["student.time_cond_proj.weight"] + update_of(*named[COND])}
    torch.save(near_w, tmp_path/"w.pt")
    state = unet.state_dict()
    del state[f"{COND}.weight"]
    base = UNet3DConditionModel.from_config(dict(unet.config) | dict(time_cond_proj_dim=None))
    base.load_state_dict(state)
    base.save_pretrained(tmp_path/"base/unet")
    save_file(mlp, tmp_path/"base"/FPS_FILE)
    more = dict(w_projection=tmp_path/"w.pt", fps=the_fps(d["io.fps"]))
    lora = path.parent/metadata(path)["lora_file"]
    convert_lora(lora, tmp_path/"base", tmp_path/"whole", "vc2", merged=True, **more)
    near(run(load_unet(tmp_path/"whole"), d), d["io.student_out"])
    convert_lora(lora, tmp_path/"base", tmp_path/"small", "vc2", **more)
    unet = with_w_projection(load_unet(tmp_path/"base"))
    told = json.loads((tmp_path/"small/student.json").read_text())
    assert told["fingerprints"] == Teacher.fingerprints(SimpleNamespace(denoiser=load_unet(tmp_path/"base")))
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path/"small"), unet)
    told = set_peft_model_state_dict(unet, read_tensors(tmp_path/"small/adapter_model.safetensors"))
    assert not told.unexpected_keys and not [k for k in told.missing_keys if "lora" in k]
    near(run(unet, d), d["io.student_out"])


@cases("vc2_unet")
def test_vc2_merged_checkpoint(path, tmp_path):
    "A merged state dict under VideoCrafter2's names"
    d, unet, named, mlp = vc2_student(path)
    teacher = under(d, "unet.")
    unet.save_pretrained(tmp_path/"base/unet")
    torch.save(teacher | under(d, "student."), tmp_path/"m.pt")
    convert_merged(tmp_path/"m.pt", tmp_path/"base", tmp_path/"out", the_fps(d["io.fps"]))
    near(run(load_unet(tmp_path/"out"), d, False), d["io.out"])
    near(run(load_unet(tmp_path/"out"), d), run(unet, d), 1e-6)


SMALL = dict(sample_size=8, block_out_channels=(32, 64, 64), layers_per_block=2, attention_head_dim=16,
             cross_attention_dim=32, time_cond_proj_dim=256,
             down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
             up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"))


def small(**kw):
    torch.manual_seed(0)
    return UNet3DConditionModel(**SMALL | kw).eval()


def random_list(unet, base, rank=8):
    gen, out = make_gen(1), []
    for o, i, *k in layer_shapes(unet, base).values():
        r = min(rank, o, i)
        out += [.1*torch.randn(o, r, *[1]*len(k), generator=gen), torch.randn(r, i, *k, generator=gen)/r]
    return out


def vc2_place(name):
    "VideoCrafter2's order once more, as a sort key over diffusers' names"
    p = name.split(".")
    rank = lambda words: next((i for i, w in enumerate(words) if w in p), 0)
    at = re.match(r"(?:(?:down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)", name)
    layer = (99 if "sampler" in at[2] else int(at[3])) if at else 0
    top = ["time_embedding", "conv_in", "down_blocks", "transformer_in", "mid_block", "up_blocks", "conv_out"]
    return (top.index(p[0]), int(at[1] or 0) if at else 0, layer,
            rank(["resnets", "temp_convs", "attentions", "temp_attentions"]),
            1 if name == COND else rank(["proj_in", "attn1", "ff", "attn2", "proj_out"]))


@pytest.mark.parametrize("config", [dict(time_cond_proj_dim=256), SMALL], ids=["published", "small"])
def test_vc2_order_from_two_sides(config):
    with torch.device("meta"): unet = UNet3DConditionModel(**config)
    layers = [n for n in lora_order(unet, "ms") if not n.startswith("transformer_in.proj_")]
    layers.sort(key=vc2_place)
    assert lora_order(unet, "vc2") == layers[:2] + FPS + layers[2:]


def test_peft_names_are_those_of_peft():
    unet = small()
    named = name_lora(random_list(unet, "ms"), unet, "ms")
    inject_adapter_in_model(lora_config(named), unet)
    want = {k: v.shape for k, v in get_peft_model_state_dict(unet).items()}
    assert {k: v.shape for k, v in to_peft(named).items()} == want


@pytest.mark.parametrize("base", ["ms", "vc2"])
def test_wrong_lists(base):
    unet, other = small(), "vc2" if base == "ms" else "ms"
    good = random_list(unet, base)
    def refused(tensors, words, base=base):
        with pytest.raises(UserError, match=words): name_lora(tensors, unet, base)
    refused(good + [good[0]], f"has {len(good) + 1} tensors")
    refused([], "has 0 tensors")
    refused(good, f"is a list for base '{base}'", other)
    bad = list(good); bad[41] = bad[41][..., :1]
    refused(bad, "has at 40 up")
    refused([v[..., None] for v in good], "has at 0 up")


def test_refused_files(tmp_path):
    torch.save([torch.zeros(1), os.getcwd], tmp_path/"code.pt")
    with pytest.raises(UserError, match="more than tensors"): read_lora(tmp_path/"code.pt")
    torch.save([torch.zeros(9)]*9, tmp_path/"cut.pt")
    (tmp_path/"cut.pt").write_bytes((tmp_path/"cut.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="is cut off"): read_lora(tmp_path/"cut.pt")
    torch.save([torch.zeros(1), "word"], tmp_path/"word.pt")
    with pytest.raises(UserError, match="not a list of tensors"): read_lora(tmp_path/"word.pt")
    torch.save([torch.zeros(1)], tmp_path/"old.pt", _use_new_zipfile_serialization=False)
    assert len(read_lora(tmp_path/"old.pt")) == 1


def test_nothing_is_left_after_a_failure(tmp_path):
    unet = small()
    with_w_projection(unet).save_pretrained(tmp_path/"base/unet")
    torch.save(random_list(unet, "ms")[:-1], tmp_path/"l.pt")
    with pytest.raises(UserError): convert_lora(tmp_path/"l.pt", tmp_path/"base", tmp_path/"out", "ms")
    with pytest.raises(UserError, match="no UNet"):
        convert_lora(tmp_path/"l.pt", tmp_path/"none", tmp_path/"out", "ms")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "l.pt"]


def test_w_projection(tmp_path, capsys):
    update = torch.randn(32, 256, generator=make_gen(0))
    assert torch.equal(w_weight(update), update)
    assert torch.equal(w_weight(update, 3), w_weight(update, "3"))
    assert (w_weight(update, 3) - update).abs().max() <= 1/16 and not torch.equal(w_weight(update, 3), w_weight(update, 4))
    save_file({f"{COND}.weight": update}, tmp_path/"w.safetensors")
    assert torch.equal(w_weight(torch.zeros(32, 256), tmp_path/"w.safetensors"), update)
    said = capsys.readouterr().out
    assert "base weight zero" in said and "seed 3" in said and "taken whole from" in said
    with pytest.raises(UserError, match="no w-projection"): w_weight(torch.zeros(8, 256), tmp_path/"w.safetensors")
    with pytest.raises(UserError, match="no file"): w_weight(update, tmp_path/"none.pt")
    with pytest.raises(UserError, match="no file"): w_weight(update, tmp_path/"none.safetensors")
    torch.save([update], tmp_path/"list.pt")
    with pytest.raises(UserError, match="not a state dict"): w_weight(update, tmp_path/"list.pt")


def test_a_unet_made_in_code_gets_a_w_projection():
    "Its configuration says of most values that they are the defaults; the width of the embedding is none any more"
    unet = UNet3DConditionModel(**{k: v for k, v in SMALL.items() if k != "time_cond_proj_dim"})
    new = with_w_projection(unet)
    assert new.config.time_cond_proj_dim == 256 and not new.time_embedding.cond_proj.weight.any()
    state = new.state_dict()
    for k, v in unet.state_dict().items(): assert state[k].data_ptr() == v.data_ptr(), k


def test_halved_base_keeps_its_dtype(tmp_path):
    unet = small().half()
    named = name_lora(random_list(unet, "ms"), unet, "ms")
    before = unet.conv_in.weight.clone()
    merge_lora(unet, named)
    assert unet.conv_in.weight.dtype == torch.float16 and not torch.equal(before, unet.conv_in.weight)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A converted VideoCrafter2 in small, at 16 frames a second, and a list for it; to be read only"
    at = tmp_path_factory.mktemp("vc2")
    torch.save(dict(state_dict=tiny_videocrafter2()), at/"model.ckpt")
    (at/"merges.txt").write_text("#version\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n")
    base = convert_videocrafter2(at/"model.ckpt", at/"vc2", 16, at/"merges.txt")
    torch.save(random_list(with_w_projection(load_unet(base)), "vc2"), at/"unet_lora.pt")
    return at


@pytest.fixture
def converted(made, tmp_path):
    "A copy of it that may be changed, and its UNet"
    base = shutil.copytree(made/"vc2", tmp_path/"vc2")
    return base, Path(shutil.copy(made/"unet_lora.pt", tmp_path)), with_w_projection(load_unet(base))


def test_list_on_a_converted_folder(converted, tmp_path):
    "A whole folder comes out; its frame rate can be chosen at once or afterwards, LoRA included"
    base, path, unet = converted
    convert_lora(path, base, tmp_path/"at16", merged=True)
    convert_lora(path, base, tmp_path/"at8", merged=True, fps=8)
    names = {p.relative_to(base) for p in base.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path/"at8") for p in (tmp_path/"at8").rglob("*") if p.is_file()} == names
    about = [json.loads((tmp_path/n/"teacher.json").read_text())["fps"] for n in ("at16", "at8")]
    assert about == [16, 8]
    bias = lambda net: net.time_embedding.linear_2.bias
    a, b = load_unet(tmp_path/"at16"), load_unet(tmp_path/"at8")
    assert not torch.equal(bias(a), bias(b))
    assert torch.equal(bias(set_fps(a, tmp_path/"at16", 8)), bias(b))
    old, new = load_fps(base), load_fps(tmp_path/"at8")
    assert not torch.equal(fps_bias(old, 8), fps_bias(new, 8))
    named = name_lora(read_lora(path), unet, "vc2")
    want = old[f"{FPS[0]}.weight"] + update_of(*named[FPS[0]])
    torch.testing.assert_close(new[f"{FPS[0]}.weight"], want)


def test_checkpoint_without_fps_takes_no_list_with_fps(tmp_path, converted):
    base, path, unet = converted
    (base/FPS_FILE).unlink()
    with pytest.raises(UserError, match=f"has no {FPS_FILE}"): convert_lora(path, base, tmp_path/"o")
    assert not (tmp_path/"o").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("merged", [True, False])
def test_interrupted(converted, tmp_path, monkeypatch, error, merged):
    base, path, _ = converted
    before = sorted(p.name for p in tmp_path.iterdir())
    def stop(self, folder, **_):
        (Path(folder)/"half").parent.mkdir(exist_ok=True); (Path(folder)/"half").touch()
        raise error
    monkeypatch.setattr(UNet3DConditionModel if merged else LoraConfig, "save_pretrained", stop)
    with pytest.raises(error): convert_lora(path, base, tmp_path/"out", merged=merged)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@torch.no_grad()
def test_adapters_with_clamped_ranks_are_the_merged_student(converted, tmp_path):
    "The first and last convolution have rank 4, the others 8; the w-projection starts at zero"
    base, path, unet = converted
    convert_lora(path, base, tmp_path/"whole", merged=True)
    convert_lora(path, base, tmp_path/"small")
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path/"small"), unet)
    set_peft_model_state_dict(unet, read_tensors(tmp_path/"small/adapter_model.safetensors"))
    gen, whole = make_gen(0), load_unet(tmp_path/"whole")
    x, ctx = torch.randn(1, 4, 3, 8, 8, generator=gen), torch.randn(1, 5, 64, generator=gen)
    emb = torch.randn(1, 256, generator=gen)
    near(*(u(x, torch.tensor([499]), ctx, timestep_cond=emb).sample for u in (unet, whole)))
    tensors, names = read_lora(path), lora_order(with_w_projection(load_unet(base)), "vc2")
    i = 2*names.index(COND)
    torch.testing.assert_close(whole.get_submodule(COND).weight, tensors[i] @ tensors[i + 1])


def test_a_list_for_the_other_base(converted, tmp_path):
    "The two networks have the same layers, so the folder must say which it is; no list is merged into the other"
    base, path, unet = converted
    torch.save(random_list(unet, "ms"), tmp_path/"ms.pt")
    unet.save_pretrained(tmp_path/"ms/unet")
    def refused(words, path, folder, base):
        with pytest.raises(UserError, match=words): convert_lora(path, folder, tmp_path/"o", base)
        assert not (tmp_path/"o").exists()
    refused("is a list for base 'ms'", tmp_path/"ms.pt", base, "vc2")
    refused("is a list for base 'vc2'", path, base, "ms")
    refused("is VideoCrafter2, not the base 'ms'", tmp_path/"ms.pt", base, "ms")
    refused(f"has no {FPS_FILE}", path, tmp_path/"ms", "vc2")
    refused("base 'sd' is unknown", path, base, "sd")
    convert_lora(tmp_path/"ms.pt", tmp_path/"ms", tmp_path/"o", "ms", base_model="some/hub-id")
    told = json.loads((tmp_path/"o/student.json").read_text())
    assert told["teacher"] == told["about"]["base_model"] == "some/hub-id" and told["options"] == {}


@pytest.mark.parametrize("fps, near", [(0, 1), (7.6, 8), (-3, 1)])
def test_frame_rates_that_cannot_be(made, tmp_path, fps, near):
    for go in (convert_lora, convert_merged):          # said before the source is even looked for
        with pytest.raises(UserError, match=f"fps {fps} is not possible.*nearest is {near}"):
            go(tmp_path/"none.pt", made/"vc2", tmp_path/"o", fps=fps)


def test_a_base_that_is_not_whole(tmp_path):
    "Diffusers would fill what is missing with random numbers"
    unet = small()
    torch.save(random_list(unet, "ms"), tmp_path/"l.pt")
    for edit, words in ((lambda s: s.pop("conv_out.bias"), r"1 missing \(conv_out.bias\)"),
                        (lambda s: s.update(extra=torch.zeros(1)), r"1 unknown \(extra\)"),
                        (lambda s: s.update({"conv_in.bias": torch.zeros(5)}),
                         r"1 of another shape \(conv_in.bias is \(5,\), not \(32,\)\)")):
        unet.save_pretrained(tmp_path/"base/unet")
        file = tmp_path/"base/unet/diffusion_pytorch_model.safetensors"
        state = load_file(file); edit(state); save_file(state, file)
        with pytest.raises(UserError, match=words): convert_lora(tmp_path/"l.pt", tmp_path/"base", tmp_path/"o", "ms")
    assert not (tmp_path/"o").exists()


def turbo(seed=3):
    "A merged student in VideoCrafter2's names; its w-projection is a plain layer, as in v2's checkpoints"
    pre = "model.diffusion_model."
    state = {k.removeprefix(pre): v for k, v in tiny_videocrafter2(seed).items() if k.startswith(pre)}
    return state | {"time_cond_proj.weight": torch.randn(32, 256, generator=make_gen(seed))}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: dict(state_dict=s, epoch=3), lambda s: dict(module=s),
                                  lambda s: {f"model.diffusion_model.{k}": v for k, v in s.items()}])
def test_merged_checkpoints_in_any_wrapping(made, tmp_path, wrap):
    state = turbo()
    torch.save(wrap(state), tmp_path/"m.pt")
    convert_merged(tmp_path/"m.pt", made/"vc2", tmp_path/"o", 8)
    got = load_unet(tmp_path/"o").state_dict()
    assert torch.equal(got[f"{COND}.weight"], state["time_cond_proj.weight"])
    want = unet_from_vc2(state, 8)[1]
    assert set(got) == set(want) and all(torch.equal(got[k], v) for k, v in want.items())


@torch.no_grad()
def test_the_motion_layers_of_v2_are_folded_in(made, tmp_path, capsys):
    "The converted UNet answers as one that runs both layers at motion scale 0"
    gen = make_gen(5)
    draw = lambda *shape: .1*torch.randn(*shape, generator=gen)
    M, C, state = draw(32, 256), draw(32, 64), turbo() | {"time_cond_proj.weight": draw(32, 256)}
    torch.save(state | {"motion_cond_proj.weight": M, "combine_proj.weight": C}, tmp_path/"m.pt")
    convert_merged(tmp_path/"m.pt", made/"vc2", tmp_path/"o", 8, steps=16, origin=200)
    assert "folded in, for motion scale 0" in capsys.readouterr().out
    assert json.loads((tmp_path/"o/teacher.json").read_text())["sampling"] == dict(steps=16, origin=200)

    class Both(torch.nn.Module):
        "What the published network adds to the embedding of the timestep"
        def forward(self, e):
            motion = w_embedding(torch.zeros(len(e)))
            return torch.cat([e @ state["time_cond_proj.weight"].T, motion @ M.T], 1) @ C.T

    got, two = load_unet(tmp_path/"o"), UNet3DConditionModel.from_config(unet_from_vc2(state, 8)[0]).eval()
    two.load_state_dict(unet_from_vc2(state, 8)[1])
    two.time_embedding.cond_proj = Both()
    x, ctx = torch.randn(1, 4, 2, 8, 8, generator=gen), torch.randn(1, 5, 64, generator=gen)
    ask = lambda net, w: net(x, torch.tensor([499]), ctx, timestep_cond=w_embedding(torch.tensor([w]))).sample
    for w in (0., 7.5): near(ask(got, w), ask(two, w), 1e-4)
    assert relative(ask(got, 0.), ask(got, 7.5)) > 1e-3
    for wrong in ({"combine_proj.weight": C[:, 1:]}, {"motion_cond_proj.weight": None}):
        torch.save({k: v for k, v in (state | {"motion_cond_proj.weight": M, "combine_proj.weight": C} | wrong).items() if v is not None}, tmp_path/"m.pt")
        with pytest.raises(UserError, match="the motion layers of .*: give unet_mg.pt as it was published"): convert_merged(tmp_path/"m.pt", made/"vc2", tmp_path/"x")


def without(*names): return lambda s: {k: v for k, v in s.items() if not k.startswith(names)}
def having(**more): return lambda s: s | {k.replace("__", "."): v for k, v in more.items()}

@pytest.mark.parametrize("edit, words", [
    (without("out.2.bias", "out.0.weight"), r"m.pt' does not have .* 2 missing \(out.0.weight, out.2.bias\)"),
    (having(lora_up=torch.zeros(1), extra__weight=torch.zeros(2)), r"2 unknown \(extra.weight, lora_up\)"),
    (having(out__2__bias=torch.zeros(7)), r"1 of another shape \(out.2.bias is \(7,\), not \(4,\)\)"),
    (having(time_cond_proj__weight=torch.zeros(31, 256)), r"time_cond_proj.weight is \(31, 256\), not \(32, 256\)"),
    (having(time_cond_proj__weight=torch.zeros(32, 100)), r"time_cond_proj.weight is \(32, 100\) .* 256 columns"),
    (without("time_cond_proj"), "has no time_cond_proj: it is no merged student"),
    (without("fps_embedding"), "has no fps_embedding.0: it is no merged student"),
    (without("fps_embedding.2"), r"2 missing \(fps_embedding.2.bias, fps_embedding.2.weight\)"),
    (lambda s: list(s.values()), "is a list, not a state dict"), (having(code=os.getcwd), r"more than tensors \(posix.getcwd\)")])
def test_merged_checkpoints_that_do_not_fit(made, tmp_path, edit, words):
    torch.save(edit(turbo()), tmp_path/"m.pt")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=words): convert_merged(tmp_path/"m.pt", made/"vc2", tmp_path/"o")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_merged_checkpoint_keeps_its_frame_rate_choosable(converted, tmp_path):
    base, path, unet = converted
    state = {k.removeprefix("model.diffusion_model."): v for k, v in tiny_videocrafter2(3).items()
             if k.startswith("model.diffusion_model.")}
    torch.save(state | {"time_cond_proj.weight": torch.zeros(32, 256)}, tmp_path/"turbo.pt")
    for fps in (8, 16): convert_merged(tmp_path/"turbo.pt", base, tmp_path/str(fps), fps)
    at8, at16 = (load_unet(tmp_path/n) for n in ("8", "16"))
    set_fps(at16, tmp_path/"16", 8)
    for k, v in at8.state_dict().items(): assert torch.equal(v, at16.state_dict()[k]), k
    assert json.loads((tmp_path/"8/teacher.json").read_text())["fps"] == 8
