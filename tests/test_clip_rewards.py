"The image rewards: gradients, batches, layouts; recorded numbers: test_golden.py"
import json
import zipfile

import pytest
import reward_checks as rc
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel

from t2v_turbo import standins, text, weights
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.rewards import clip, imagereward, loading, names, viclip
from t2v_turbo.rewards.base import per_frame

each = pytest.mark.parametrize("name", rc.IMAGE)
each_and_tiny = pytest.mark.parametrize("name", [*rc.IMAGE, "tiny-image"])


# --- every image reward --------------------------------------------------------------------------

@each_and_tiny
def test_gradient(name): rc.finite_difference(rc.build(name, torch.float64))


@each_and_tiny
def test_batch(name): rc.batch_equals_single(rc.build(name))


@each_and_tiny
@torch.no_grad()
def test_frames_are_averaged_in_any_order(name):
    rm = rc.build(name)
    x, order = rc.clips(rm, t=4), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(rm(x[:, :, order], rc.PROMPTS[:2]), rm(x, rc.PROMPTS[:2]))
    alone = per_frame(rm, x, rc.PROMPTS[:2])
    torch.testing.assert_close(alone.mean(1), rm(x, rc.PROMPTS[:2]), rtol=1e-4, atol=1e-5)
    assert alone.std(1).min() > 1e-5, "the frames differ"


@each_and_tiny
@torch.no_grad()
def test_bf16(name):
    "Cosines within 0.02 of float32, the two learned scales within 0.1, logits of the tiny world within 0.3"
    rm = rc.build(name)
    x = rc.clips(rm, 3)
    want, got = rm(x, rc.PROMPTS), rc.build(name, torch.bfloat16)(x, rc.PROMPTS)
    assert got.dtype == torch.float32
    tol = {"imagereward": .1, "aesthetic": .1, "tiny-image": .3}.get(name, .02)
    torch.testing.assert_close(got, want, rtol=0, atol=tol)


@each
def test_chunks_change_only_the_memory(name):
    rm = rc.build(name)
    x = rc.clips(rm, 2, t=4).requires_grad_()
    whole, g = rc.saved_bytes(rm, x, rc.PROMPTS[:2])
    rm.chunk = 2
    part, g2 = rc.saved_bytes(rm, x, rc.PROMPTS[:2])
    torch.testing.assert_close(g2, g, rtol=1e-4, atol=1e-7)
    assert part < (.95 if name == "imagereward" else .7)*whole, (part, whole)   # its text is not cut


@each_and_tiny
def test_nan_stays_with_its_clip(name): rc.nan_stays_with_its_clip(rc.build(name))


@each_and_tiny
def test_nothing_trains_but_the_pixels(name):
    rm = rc.build(name)
    x = rc.clips(rm).requires_grad_()
    rm(x, rc.PROMPTS[:2]).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in rm.parameters())
    assert not any(m.training for m in rm.modules())


@pytest.mark.parametrize("name", ["hpsv2", "clipscore"])
def test_a_prompt_is_read_once(name):
    rm = rc.build(name)
    seen = rc.a_prompt_is_read_once(rm)
    rm.to(torch.float64)                                     # another dtype: read again
    assert rm.text_features(["a dog"]).dtype == torch.float64 and len(seen) == 3


def test_kept_texts_are_bounded(monkeypatch):
    rm = rc.build("hpsv2")
    monkeypatch.setattr("t2v_turbo.rewards.cosine.TEXTS_KEPT", 2)
    u = rm.text_features(["a", "b", "c", "a"])
    assert u.shape == (4, 24) and torch.equal(u[0], u[3]) and list(rm._texts) == ["b", "c"]


def test_prompt_and_image_matter():
    rm = rc.build("hpsv2")
    x = rc.clips(rm, 1)
    R = [rm(x, [p]).item() for p in rc.PROMPTS] + [rm(x.flip(4), ["a dog"]).item()]
    assert len({round(r, 4) for r in R}) == 4 and all(-1 <= r <= 1 for r in R)


def test_a_long_prompt_is_reported_with_its_cut():
    rm = rc.build("hpsv2")
    told = rc.warned(lambda: rm(rc.clips(rm), ["a " * 80, "a dog"]))
    assert len(told) == 1 and "takes 77" in told[0] and "it was cut to" in told[0]


# --- pixels --------------------------------------------------------------------------------------

@pytest.mark.parametrize("h,w", [(320, 512), (512, 320), (64, 64), (40, 80), (97, 56), (31, 200)])
@pytest.mark.parametrize("fit", ["letterbox", "squash", "crop"])
def test_any_shape_becomes_a_square(fit, h, w):
    x = getattr(clip, fit)(torch.full((1, 3, h, w), .5), 56)
    assert x.shape == (1, 3, 56, 56)
    inside = x[0, 0, 56//2 - 2:56//2 + 2, 56//2 - 2:56//2 + 2]
    torch.testing.assert_close(inside, torch.full_like(inside, .5))
    bars = (x == 0).float().mean().item()
    want = 1 - round(56*min(h, w)/max(h, w))/56 if fit == "letterbox" else 0
    assert abs(bars - want) < 1e-6


def test_letterbox_is_centred_and_comes_before_the_normalisation():
    rm = rc.build("hpsv2")
    x = rm.prepare(torch.ones(1, 3, 1, 32, 20))[0, :, 0]
    black = -torch.tensor(loading.CLIP_STATS[0])/torch.tensor(loading.CLIP_STATS[1])
    torch.testing.assert_close(x[:, 5, 0], black)
    blank = (x[0, 5] == x[0, 5, 0]).nonzero().flatten().tolist()
    assert blank == [0, 1, 2, 3, 4, 5, 26, 27, 28, 29, 30, 31]


def test_crop_window():
    x = torch.arange(48.).expand(1, 3, 32, 48)
    assert loading.crop(x, 32)[0, 0, 0, 0] == 8
    lefts = {loading.crop(x, 32, make_gen(s))[0, 0, 0, 0].item() for s in range(40)}
    assert min(lefts) >= 0 and max(lefts) <= 16 and len(lefts) > 8


@pytest.mark.parametrize("fit", ["letterbox", "squash", "crop"])
def test_resize_is_antialiased(fit):
    "Shrunk by eight, nearly every pixel still counts; plain bicubic would read one in four"
    x = torch.rand(1, 3, 256, 256, generator=make_gen(0)).requires_grad_()
    getattr(clip, fit)(x, 32).sum().backward()
    assert (x.grad != 0).float().mean() > .9


def test_pixels_are_prepared_in_float32():
    rm = rc.build("hpsv2", torch.bfloat16)
    x = rc.clips(rm)
    assert rm(x.bfloat16(), rc.PROMPTS[:2]).dtype == torch.float32
    assert rm.prepare(x).dtype == torch.float32


@pytest.mark.parametrize("bad,says", [
    (torch.rand(2, 3, 1, 8, 8)*.5 + .7, "bring them to"), (torch.rand(2, 3, 1, 8, 8)*.5 - .2, "bring them to"),
    (torch.rand(3, 3, 1, 8, 8), "3 clips and 2 prompts"), (torch.rand(2, 4, 1, 8, 8), "of shape"),
    (torch.rand(2, 3, 8, 8), "of shape")])
def test_bad_frames(bad, says):
    for name in rc.ALL:
        rm = rc.build(name)
        x = bad.expand(-1, -1, rm.facts.frames or 1, -1, -1) if bad.ndim == 5 else bad
        with pytest.raises(UserError, match=f"^{rm.facts.name} was given .*{says}"): rm(x, ["a", "b"])


@torch.no_grad()
def test_tiny_rewards_bring_every_size_to_their_own():
    "64 x 64 stays to the bit; twice that, with every pixel doubled, scores about the same"
    for name in rc.TINY:
        rm, x = rc.build(name), rc.clips(rc.build(name), size=(64, 64), t=8)
        assert rm.prepare(x) is x
        large = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        assert rm.prepare(large).shape == x.shape
        torch.testing.assert_close(rm.prepare(large), x, rtol=0, atol=.02)
        assert rm.prepare(torch.rand(2, 3, 8, 90, 160)).shape == (2, 3, 8, 64, 64)


# --- layouts -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full():
    with torch.device("meta"): return CLIPModel(CLIPConfig(
        projection_dim=1024, vision_config=dict(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
            patch_size=14, image_size=224, hidden_act="gelu"),
        text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                         num_attention_heads=16, hidden_act="gelu", eos_token_id=49407)))


def meta(module, table): return {k: v for k, v in weights.published(module, table).items()}


def test_full_size_layout(full):
    "986.1 M parameters; from the published shapes alone come the published sizes"
    assert round(sum(p.numel() for p in full.parameters())/1e5) == 9861
    state = meta(full, clip.open_clip_table(full.config))
    assert len(state) == 686
    for k, shape in {"visual.conv1.weight": (1280, 3, 14, 14), "visual.proj": (1280, 1024),
                     "visual.positional_embedding": (257, 1280), "positional_embedding": (77, 1024),
                     "token_embedding.weight": (49408, 1024), "text_projection": (1024, 1024),
                     "visual.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
                     "transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024)}.items():
        assert tuple(state[k].shape) == shape, k
    again = clip.open_clip_config(state)
    for part in ("vision_config", "text_config"):
        a, b = getattr(again, part), getattr(full.config, part)
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "hidden_act"): assert getattr(a, k) == getattr(b, k), k
    assert again.text_config.eos_token_id == 49407 and again.vision_config.image_size == 224
    rows = weights.convert(state, clip.open_clip_table(again), full, "HPSv2.1")
    assert rows.keys() == full.state_dict().keys()


@pytest.fixture
def state():
    small = standins.tiny_clip()
    return weights.published(small, clip.open_clip_table(small.config))


HEADS = dict(head=16, text_heads=2)


def test_round_trip(state):
    small, again = standins.tiny_clip().state_dict(), clip.open_clip_model(state, **HEADS)
    assert small.keys() == again.state_dict().keys()
    for k, v in small.items(): assert torch.equal(again.state_dict()[k], v), k
    assert not any(b.is_meta for b in again.buffers())


@pytest.mark.parametrize("key", [
    "logit_scale", "visual.class_embedding", "visual.ln_post.bias", "ln_final.weight", "visual.proj",
    "visual.transformer.resblocks.1.attn.in_proj_bias", "transformer.resblocks.0.mlp.c_proj.weight"])
def test_a_missing_tensor_is_named(key, state):
    del state[key]
    with pytest.raises(UserError, match=f"^these are not the weights of X: 1 missing .{key}.; give the file as it was published$"):
        clip.open_clip_model(state, "X", **HEADS)


def test_missing_unknown_and_misshapen_are_counted(state):
    for k in [k for k in state if "resblocks.0.ln_2" in k]: del state[k]
    state |= {"score.weight": torch.ones(1), "visual.ln_pre.bias": torch.zeros(5)}
    with pytest.raises(UserError) as e: clip.open_clip_model(state, "HPSv2.1", **HEADS)
    said = str(e.value)
    assert "4 missing (transformer.resblocks.0.ln_2.bias" in said and "1 unknown (score.weight)" in said
    assert "1 of another shape (visual.ln_pre.bias is (5,), not (32,))" in said and "\n" not in said


def test_weights_of_another_model():
    with pytest.raises(UserError, match="not the weights of hpsv2.1: there is no tensor visual.conv1"):
        clip.open_clip_model(standins.tiny_viclip(), "hpsv2.1")
    with pytest.raises(UserError, match="clipscore"):
        clip.open_clip_model({"visual.conv1.weight": torch.zeros(32, 3, 8, 8)}, "clipscore")


# --- files ---------------------------------------------------------------------------------------

@pytest.fixture
def merges(tmp_path):
    path = tmp_path/"merges.txt"
    path.write_text("#version\n" + "\n".join(" ".join(m) for m in rc.MERGES))
    return path


def small_hps():
    "Two layers, with heads of 80 and of 64 channels as published, in fp16"
    torch.manual_seed(0)
    each = dict(num_hidden_layers=2, intermediate_size=64, hidden_act="gelu")
    net = CLIPModel(CLIPConfig(projection_dim=24, vision_config=dict(
        each, hidden_size=160, num_attention_heads=2, image_size=32, patch_size=8), text_config=dict(
        each, hidden_size=128, num_attention_heads=2, vocab_size=520, max_position_embeddings=77,
        eos_token_id=519, bos_token_id=518))).half()
    return net


@pytest.mark.parametrize("kind", ["pt", "bare", "safetensors"])
def test_hpsv2_from_a_file(kind, merges, tmp_path):
    "The published nesting, no nesting, and safetensors"
    net = small_hps()
    state = {k: v.contiguous() for k, v in weights.published(net, clip.open_clip_table(net.config)).items()}
    path = tmp_path/("hps.safetensors" if kind == "safetensors" else "hps.pt")
    if kind == "safetensors":
        save_file(state, path)
    else: torch.save(state if kind == "bare" else dict(state_dict=state, epoch=3), path)
    rm = clip.hpsv2(path, merges)
    assert rm.dtype == torch.float32 and rm.fit is loading.letterbox and rm.facts.name == "hpsv2.1"
    want = clip.CLIPReward(clip.HPS, net.float().eval(), rm.tokenizer, loading.letterbox)
    x = rc.clips(rm)
    torch.testing.assert_close(rm(x, rc.PROMPTS[:2]), want(x, rc.PROMPTS[:2]).detach())
    assert clip.clipscore(path, merges).fit is loading.squash
    assert clip.hpsv2(path, merges, torch.bfloat16, 3).dtype == torch.bfloat16


def test_from_a_folder(tmp_path):
    standins.tiny_clip().save_pretrained(tmp_path/"c")
    rc.build("hpsv2").tokenizer.save_pretrained(tmp_path/"c")
    rm, x = clip.pickscore(tmp_path/"c", chunk=2), rc.clips(rc.build("hpsv2"))
    torch.testing.assert_close(rm(x, rc.PROMPTS[:2]), rc.build("clipscore")(x, rc.PROMPTS[:2]))
    assert rm.chunk == 2
    standins.tiny_clip().save_pretrained(tmp_path/"half")
    half = {k: v for k, v in load_file(tmp_path/"half/model.safetensors").items() if k.startswith("vision_model")}
    save_file(half, tmp_path/"half/model.safetensors", dict(format="pt"))
    with pytest.raises(UserError, match="does not have the tensors of pickscore: .* missing"): clip.pickscore(tmp_path/"half")
    standins.tiny_clip().save_pretrained(tmp_path/"mute")
    with pytest.raises(UserError, match="has no tokenizer .none of tokenizer.json"): clip.pickscore(tmp_path/"mute")


@pytest.mark.parametrize("data", [b"", b"hello", b"cut"])
def test_a_file_that_is_no_checkpoint(data, tmp_path, state, merges):
    path = tmp_path/"hps.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:20_000] if data == b"cut" else data)
    with pytest.raises(UserError, match="cannot be read as tensors"): clip.hpsv2(path, merges)


class Program:
    "Runs when it is unpickled without care"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path, state):
    torch.save(dict(state_dict=state, extra=Program(tmp_path/"ran")), tmp_path/"hps.pt")
    with pytest.raises(UserError, match="cannot be read"): weights.read_weights(tmp_path/"hps.pt")
    assert not (tmp_path/"ran").exists()


def test_no_hub(monkeypatch):
    "Without a path the hub is asked; when it does not answer, the mend is named"
    def gone(name): raise UserError(f"{name!r}: no network")
    monkeypatch.setattr(loading, "fetch_file", gone)
    for load in (clip.hpsv2, imagereward.imagereward, viclip.viclip):
        with pytest.raises(UserError, match="cannot be fetched: .*no network.* give its path"): load()


def test_identity():
    "Another seed of the same reward differs; precision and name do not; a mix tells its parts and their weights"
    from dataclasses import replace

    from t2v_turbo.identity import differing, reward_identity
    from t2v_turbo.rewards.base import mix
    from t2v_turbo.rewards.tiny import load_reward
    same = lambda a, b: differing(reward_identity(a), reward_identity(b))
    a, b = load_reward("tiny-image"), load_reward("tiny-image")
    assert same(a, b) == [] == same(a, b.half())
    b = load_reward("tiny-image")
    with torch.no_grad(): b.head[0].weight.view(-1)[77] += 1e-3
    b.facts = replace(b.facts, name="other")
    assert same(a, b) == ["weights"]
    one, two = (reward_identity(mix({a: w, load_reward("tiny-video"): 1.})) for w in (1., .5))
    assert [*one] == ["tiny-image", "tiny-video"] and differing(one, two) == ["tiny-image"]


def test_vocabulary_must_fit(tmp_path, merges):
    net = small_hps()
    torch.save(weights.published(net, clip.open_clip_table(net.config)), tmp_path/"hps.pt")
    merges.write_text("#version\np a\n")
    with pytest.raises(UserError, match="has 1 merges"): clip.hpsv2(tmp_path/"hps.pt", merges)
    with pytest.raises(UserError, match="pip download"): clip.hpsv2(tmp_path/"hps.pt", tmp_path/"no")


def test_channels_that_are_no_heads(state):
    with pytest.raises(UserError, match="32 channels of the image tower cannot be split into heads of 80"):
        clip.open_clip_model(state, "hpsv2.1")


# --- CLIP's vocabulary ---------------------------------------------------------------------------

@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    "A machine on which no vocabulary can be found"
    monkeypatch.delenv("T2V_TURBO_CLIP_VOCABULARY", raising=False)
    monkeypatch.setattr(text.constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(text, "distributions", list)
    return tmp_path


def in_the_cache(tmp_path, name, merges, file="merges.txt"):
    path = tmp_path/"hub"/f"models--{name}"/"snapshots"/"abc"/file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges), encoding="utf-8")


def test_no_vocabulary_is_told(nowhere):
    with pytest.raises(UserError, match="not found: give with --vocabulary, .*pip download"): text.clip_merges()
    in_the_cache(nowhere, "openai-community--gpt2", [("Ġ", "t"), ("Ġ", "a")] + [("h", "e")]*60000)
    with pytest.raises(UserError, match="not found"): text.clip_merges()


def test_vocabulary_that_was_named(nowhere, merges, monkeypatch):
    "The argument before the environment; neither must be CLIP's own"
    monkeypatch.setenv("T2V_TURBO_CLIP_VOCABULARY", str(merges))
    assert text.clip_merges() == text.clip_merges("") == rc.MERGES
    (nowhere/"tokenizer.json").write_text(json.dumps(dict(model=dict(merges=["x y"]))))
    assert text.clip_merges(nowhere/"tokenizer.json") == text.clip_merges(nowhere/"tokenizer.json") == [("x", "y")]
    monkeypatch.setenv("T2V_TURBO_CLIP_VOCABULARY", str(nowhere/"lost"))
    with pytest.raises(UserError, match="no vocabulary at .*lost"): text.clip_merges()


def test_vocabulary_of_an_installed_package(clip_vocabulary, nowhere, monkeypatch):
    "open_clip_torch unpacked as pip would leave it; it cannot be imported here, and is not"
    monkeypatch.undo()
    monkeypatch.delenv("T2V_TURBO_CLIP_VOCABULARY", raising=False)
    with zipfile.ZipFile(clip_vocabulary) as z: z.extractall(nowhere/"site")
    (nowhere/"site/open_clip/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(nowhere/"site")
    found = text.clip_merges()
    assert text.is_clip(found) and found[0] == ("i", "n") and found[48893] == ("jeky", "ll</w>")
    changed = list(found)
    changed[100], changed[101] = found[101], found[100]
    assert not text.is_clip(changed)


def test_vocabulary_in_the_hub_cache(clip_vocabulary, nowhere):
    "GPT-2's merges lie there too, and come first; a folder of a diffusion model has a `tokenizer` inside"
    right = text.read_merges(clip_vocabulary)[:text.CLIP_MERGES]
    in_the_cache(nowhere, "a--gpt2", [("Ġ", "t")]*3)
    in_the_cache(nowhere, "a--broken", [], "tokenizer.json")
    in_the_cache(nowhere, "stabilityai--sd", right, "tokenizer/merges.txt")
    assert text.clip_merges() == right
    ids = text.clip_tokenizer(text.clip_merges())("a photo of a cat", padding="max_length")["input_ids"]
    assert ids[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


def test_one_vocabulary_for_the_loaders_that_read_one(tmp_path, merges, nowhere):
    "Without it HPSv2.1 cannot read; the tiny rewards are not handed any"
    net = small_hps()
    torch.save(weights.published(net, clip.open_clip_table(net.config)), tmp_path/"hps.pt")
    texts = [f"hpsv2.1@{tmp_path/'hps.pt'}", "tiny-video"]
    got = names.rewards_from(texts, vocabulary=str(merges))
    rm, = (r for r, _ in got["image"].parts)
    assert rm.tokenizer.tokenize("panda") == ["panda</w>"] and got["video"] is not None
    with pytest.raises(UserError, match="vocabulary was not found"): names.rewards_from(texts)
    with pytest.raises(UserError, match="given but tiny-video read none"):
        names.rewards_from(["tiny-video"], vocabulary=str(merges))


# --- heads ---------------------------------------------------------------------------------------

def test_aesthetic_is_the_row_of_layers():
    torch.manual_seed(0)
    row = nn.Sequential(*(nn.Linear(a, b) for a, b in ((24, 16), (16, 8), (8, 1))))
    rm = rc.build("aesthetic")
    rm.head = loading.linear_head({f"layers.{2*i}.{k}": v for i, m in enumerate(row)
                                for k, v in m.state_dict().items()}, "x")
    x = rc.clips(rm)
    with torch.no_grad():
        want = row(F.normalize(rm.vision(rm.prepare(x)), dim=-1)).mean((1, 2))
        torch.testing.assert_close(rm(x, ["", ""]), want)
        assert torch.equal(rm(x, ["a", "b"]), rm(x, ["", ""])), "no prompt is read"


def test_aesthetic_from_files(tmp_path):
    standins.tiny_clip().save_pretrained(tmp_path/"c")
    torch.save(dict(weight=torch.randn(1, 24), bias=torch.zeros(1)), tmp_path/"h.pth")
    rm = clip.aesthetic(tmp_path/"h.pth", tmp_path/"c", chunk=3)
    assert rm(rc.clips(rm), ["", ""]).shape == (2,) and rm.chunk == 3
    torch.save(dict(weight=torch.randn(1, 25), bias=torch.zeros(1)), tmp_path/"h.pth")
    with pytest.raises(UserError, match="takes 25 numbers .* gives 24"):
        clip.aesthetic(tmp_path/"h.pth", tmp_path/"c")


@pytest.mark.parametrize("state", [{}, {"weight": 1}, {"layers.0.weight": 1}, {"fc.weight": 1, "fc.bias": 1}])
def test_a_head_that_is_none(state):
    with pytest.raises(UserError, match="not the weights"):
        loading.linear_head({k: torch.ones(1, 1) for k in state}, "x")


def test_a_row_must_fit():
    row = {"layers.0.weight": torch.ones(3, 2), "layers.0.bias": torch.ones(3),
           "layers.2.weight": torch.ones(1, 4), "layers.2.bias": torch.ones(1)}
    with pytest.raises(UserError, match="layers.2 takes 4 numbers, not 3"): loading.linear_head(row, "x")


def test_imagereward_full_size():
    with torch.device("meta"): net = imagereward.ImageReward(
        imagereward.IMAGEREWARD, BlipVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                           num_attention_heads=16, image_size=224),
        BlipTextConfig(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, is_decoder=True,
                       intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    table = imagereward.imagereward_table(net)
    assert sorted(n for v in table.values() for n in v) == sorted(
        k for k in net.state_dict() if not k.startswith("head."))
    eyes, words = imagereward.imagereward_sizes(weights.published(net, table))
    assert (eyes.num_hidden_layers, eyes.num_attention_heads, eyes.image_size) == (24, 16, 224)
    assert (words.num_hidden_layers, words.encoder_hidden_size) == (12, 1024)


def test_imagereward_from_a_file(tmp_path):
    (tmp_path/"vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *rc.WORDS]))
    BertTokenizer(str(tmp_path/"vocab.txt")).save_pretrained(tmp_path/"bert")
    torch.save(standins.tiny_imagereward(), tmp_path/"ir.pt")
    rm, own = imagereward.imagereward(tmp_path/"ir.pt", tmp_path/"bert", heads=2), rc.build("imagereward")
    x = rc.clips(rm)
    torch.testing.assert_close(rm(x, rc.PROMPTS[:2]), own(x, rc.PROMPTS[:2]))
    for change in ({"extra": torch.ones(1)}, {"blip.visual_encoder.norm.bias": torch.ones(3)}):
        torch.save(standins.tiny_imagereward() | change, tmp_path/"ir.pt")
        with pytest.raises(UserError, match=f"imagereward: 1 [a-z ]+ .{next(iter(change))}"):
            imagereward.imagereward(tmp_path/"ir.pt", tmp_path/"bert", heads=2)


def test_imagereward_is_standardised_and_ignores_padding():
    "A head of zeros gives -mean/std; more padding changes nothing"
    rm = rc.build("imagereward")
    x, R = rc.clips(rm), rm(rc.clips(rm), rc.PROMPTS[:2])
    rm.facts = clip.replace(rm.facts, tokens=9)
    torch.testing.assert_close(rm(x, rc.PROMPTS[:2]), R)
    for p in rm.head.parameters(): p.zero_()
    torch.testing.assert_close(rm(x, rc.PROMPTS[:2]), torch.full((2,), -.16717363/1.0333395))


# --- names ---------------------------------------------------------------------------------------

def test_names():
    assert names.REWARDS.keys() == names.FACTS.keys() and len(names.REWARDS) == 13
    for name, f in names.FACTS.items():
        assert f.name == name and f.licence and f.weights and f.size
        assert f.frames > 0 and (f.tokens == 0) == (name == "aesthetic")
        assert name in names.facts_table() and f.weights in names.facts_table()
    assert names.parse_reward("viclip-l14=2@a@b") == ("viclip-l14", 2., "a@b")


@pytest.mark.parametrize("text,says", [
    ("hps=1", "unknown: give one of aesthetic, .*videoprism-large"), ("hpsv2.1=", "write hpsv2.1=1.0"),
    ("hpsv2.1=nan", "not a number"), ("", "unknown")])
def test_bad_names(text, says):
    with pytest.raises(UserError, match=says): names.parse_reward(text)


def test_rewards_from_texts(tmp_path):
    standins.tiny_clip().save_pretrained(tmp_path)
    rc.build("hpsv2").tokenizer.save_pretrained(tmp_path)
    got = names.rewards_from([f"pickscore=.5@{tmp_path}", f"clipscore=2@{tmp_path}"],
                             dict(pickscore=dict(chunk=1)))
    x, one = rc.clips(rc.build("hpsv2")), rc.build("clipscore")
    torch.testing.assert_close(got["image"](x, rc.PROMPTS[:2]), 2.5*one(x, rc.PROMPTS[:2]))
    assert got["video"] is None
