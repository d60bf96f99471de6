"The video rewards: gradients, batches, time, memory, layouts; recorded numbers: test_golden.py"

import pytest
import reward_checks as rc
import torch
import transformers
from transformers import BertTokenizer

from t2v_turbo import standins, weights
from t2v_turbo.core import make_gen
from t2v_turbo.files import UserError
from t2v_turbo.rewards import internvideo2 as iv2
from t2v_turbo.rewards import names, viclip
from t2v_turbo.rewards import videoprism as prism

each = pytest.mark.parametrize("name", rc.VIDEO)
each_and_tiny = pytest.mark.parametrize("name", [*rc.VIDEO, "tiny-video", "tiny-tube"])


# --- every video reward --------------------------------------------------------------------------

@each_and_tiny
def test_gradient(name):
    "VideoPrism's softmax runs in float32 inside transformers: a larger step, a looser bound"
    loose = dict(h=1e-3, rtol=2e-3) if name == "videoprism" else {}
    rc.finite_difference(rc.build(name, torch.float64), **loose)


@each_and_tiny
def test_batch(name): rc.batch_equals_single(rc.build(name))


@each_and_tiny
@torch.no_grad()
def test_the_order_of_frames_matters(name):
    rm = rc.build(name)
    x = rc.clips(rm)
    order = torch.randperm(x.shape[2], generator=make_gen(0))
    assert (rm(x, rc.PROMPTS[:2]) - rm(x[:, :, order], rc.PROMPTS[:2])).abs().min() > 1e-4


@each_and_tiny
@torch.no_grad()
def test_bf16(name):
    "Cosines within 0.05 of float32 on random weights, logits of the tiny world within 0.3"
    rm = rc.build(name)
    x = rc.clips(rm, 3)
    got = rc.build(name, torch.bfloat16)(x, rc.PROMPTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, rm(x, rc.PROMPTS), rtol=0, atol=.3 if name in rc.TINY else .05)


@each_and_tiny
def test_nan_stays_with_its_clip(name): rc.nan_stays_with_its_clip(rc.build(name))


@each
def test_a_prompt_is_read_once(name): rc.a_prompt_is_read_once(rc.build(name))


@each_and_tiny
def test_nothing_trains_but_the_pixels(name):
    rm = rc.build(name)
    x = rc.clips(rm).requires_grad_()
    rm(x, rc.PROMPTS[:2]).sum().backward()
    assert (x.grad.abs().sum((1, 3, 4)) > 0).all(), "every frame of every clip"
    assert not any(p.requires_grad or p.grad is not None for p in rm.parameters())


@each
def test_a_long_prompt_is_reported_with_its_cut(name):
    rm = rc.build(name)
    told = rc.warned(lambda: rm(rc.clips(rm), ["a " * 80, "a dog"]))
    assert len(told) == 1 and f"takes {rm.facts.tokens}" in told[0]


@pytest.mark.parametrize("name", ["tiny-video", "tiny-tube"])
@torch.no_grad()
def test_a_tiny_reward_reads_a_prompt_to_its_end(name):
    "Its words count wherever they stand, nothing is cut, and others add nothing"
    rm = rc.build(name)
    x, found = rc.clips(rm), []
    told = rc.warned(lambda: found.extend(rm(x, [p]*2) for p in ("so " * 80 + "red fish", "red fish", "so")))
    assert not told and torch.equal(found[0], found[1]) and (found[1] - found[2]).abs().min() > .1


@each
def test_frame_count_and_range(name):
    rm = rc.build(name)
    for t in (rm.facts.frames - 1, rm.facts.frames * 2):
        with pytest.raises(UserError, match=f"looks at {rm.facts.frames} frames but was given {t}"):
            rm(torch.rand(1, 3, t, 32, 32), ["a"])
    with pytest.raises(UserError, match="bring them to"): rm(rc.clips(rm) * 2 - 1, ["a", "a"])


def saving(name):
    rm = rc.videoprism(save_memory=True) if name == "videoprism" else rc.ALL[name]()
    if name == "viclip": rm.eyes.save_memory = True
    if name == "internvideo2": rm.vision_encoder.save_memory = True
    return rm.frozen(torch.float32)


@each
def test_save_memory_changes_only_the_memory(name):
    plain, less = rc.build(name), saving(name)
    x = rc.clips(plain).requires_grad_()
    a, g = rc.saved_bytes(plain, x, rc.PROMPTS[:2])
    b, g2 = rc.saved_bytes(less, x, rc.PROMPTS[:2])
    torch.testing.assert_close(g2, g, rtol=1e-4, atol=1e-7)
    assert b < .6*a, (a, b)


@pytest.mark.parametrize("name", ["viclip", "internvideo2"])
@torch.no_grad()
def test_the_window_can_move_and_is_the_same_for_all_frames(name):
    rm = rc.build(name)
    x = torch.arange(52.).div(52).expand(1, 3, rm.facts.frames, 40, 52)
    lefts = set()
    rm.gen = make_gen(0)
    for _ in range(8):
        y = rm.prepare(x)
        torch.testing.assert_close(y, y[:, :, :1].expand_as(y))
        lefts.add(round(y[0, 0, 0, 0, 0].item(), 4))
    assert len(lefts) > 2
    rm.gen = None
    assert torch.equal(rm.prepare(x), rm.prepare(x))


# --- ViCLIP --------------------------------------------------------------------------------------

@pytest.mark.parametrize("base,millions,width,layers", [(False, 428, 1024, 24), (True, 150, 768, 12)])
def test_viclip_full_size(base, millions, width, layers):
    with torch.device("meta"): net = viclip.viclip_full(base)
    assert round(sum(p.numel() for p in net.parameters())/1e6) == millions
    state = weights.published(net, viclip.viclip_table(net))
    p = 16 if base else 14
    for k, shape in {"conv1.weight": (width, 3, 1, p, p), "class_embedding": (width,),
                     "positional_embedding": ((224//p)**2 + 1, width), "ln_post.bias": (width,),
                     "temporal_positional_embedding": (1, 8, width),
                     "proj": (width, 512 if base else 768),
                     f"transformer.resblocks.{layers - 1}.attn.in_proj_weight": (3*width, width),
                     }.items(): assert tuple(state[f"vision_encoder.{k}"].shape) == shape, k
    assert f"vision_encoder.transformer.resblocks.{layers}.ln_1.bias" not in state
    assert state["text_encoder.positional_embedding"].shape[0] == 32
    again = viclip.viclip_model(state, net.facts)
    assert again.state_dict().keys() == net.state_dict().keys()
    assert again.eyes.layers[0].self_attn.num_heads == width // 64


def test_viclip_round_trip_and_file(tmp_path):
    state = standins.tiny_viclip(words=520)
    rm = viclip.viclip_model(state, heads=(2, 2))
    back = weights.published(rm, viclip.viclip_table(rm))
    assert back.keys() == state.keys() - {"temp"}
    for k, v in back.items(): assert torch.equal(v, state[k]), k
    (tmp_path/"m.txt").write_text("#\n" + "\n".join(" ".join(m) for m in rc.MERGES))
    wide = weights.published(net := small_viclip(), viclip.viclip_table(net)) | {"temp": torch.ones(())}
    torch.save(dict(model=wide), tmp_path/"v.pth")
    rm = viclip.viclip(tmp_path/"v.pth", tmp_path/"m.txt", save_memory=True)
    assert rm.eyes.save_memory and rm.facts.tokens == 32 and rm.facts.size == 32
    net.tokenizer = rm.tokenizer
    x = rc.clips(rm)
    torch.testing.assert_close(rm(x, rc.PROMPTS[:2]), net.eval()(x, rc.PROMPTS[:2]).detach())


def small_viclip():
    "Heads of 64 channels, as published"
    torch.manual_seed(0)
    each = dict(attn_implementation="sdpa", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                hidden_act="quick_gelu")
    return viclip.ViCLIP(viclip.VICLIP_L, viclip.CLIPVisionConfig(**each, image_size=32, patch_size=8),
                         viclip.CLIPTextConfig(**each, vocab_size=520, max_position_embeddings=32,
                                               projection_dim=24, eos_token_id=519, bos_token_id=518))


@pytest.mark.parametrize("key", ["vision_encoder.class_embedding", "vision_encoder.proj",
                                 "vision_encoder.transformer.resblocks.1.attn.in_proj_weight",
                                 "text_encoder.ln_final.bias", "text_encoder.text_projection",
                                 "vision_encoder.temporal_positional_embedding"])
def test_viclip_missing(key):
    state = standins.tiny_viclip()
    del state[key]
    with pytest.raises(UserError, match=f"not the weights of viclip-l14: .*{key}"):
        viclip.viclip_model(state, heads=(2, 2))
    with pytest.raises(UserError, match="1 unknown .odd."):
        viclip.viclip_model(standins.tiny_viclip() | {"odd": torch.ones(1)}, heads=(2, 2))


def test_one_class_token_and_joint_attention():
    "The first frame's class position is used once; a late frame changes what an early one becomes"
    net = rc.build("viclip").eyes
    x = torch.randn(1, 3, 8, 32, 32, generator=make_gen(0))
    tokens = []
    net.layers[0].register_forward_pre_hook(lambda m, a: tokens.append(a[0]))
    net.layers[1].register_forward_pre_hook(lambda m, a: tokens.append(a[0]))
    net(x)
    y = x.clone()
    y[:, :, 7] += 1
    net(y)
    assert tokens[0].shape == (1, 1 + 8*16, 32)
    same = (tokens[0] == tokens[2])[0].all(-1)
    assert same.sum() == 1 + 7*16, "before the first layer only the last frame differs"
    assert not (tokens[1] == tokens[3])[0].all(-1).any(), "behind it all tokens do"


# --- InternVideo2 --------------------------------------------------------------------------------

def test_internvideo2_full_size():
    with torch.device("meta"): net = iv2.internvideo2_full()
    count = lambda m: round(sum(p.numel() for p in m.parameters())/1e6)
    assert count(net.vision_encoder.blocks) == 1010 and count(net.text_encoder) == 271
    state = weights.published(net, iv2.internvideo2_table(net, {}))
    for k, shape in {
            "vision_encoder.patch_embed.proj.weight": (1408, 3, 1, 14, 14),
            "vision_encoder.pos_embed": (1, 1025, 1408), "vision_encoder.img_pos_embed": (1, 257, 1408),
            "vision_encoder.blocks.39.attn.qkv.weight": (4224, 1408),
            "vision_encoder.blocks.39.attn.q_norm.weight": (1408,),
            "vision_encoder.blocks.0.mlp.fc1.weight": (6144, 1408),
            "vision_encoder.blocks.0.ls1.gamma": (1408,),
            "vision_encoder.clip_projector.cross_attn.q_bias": (1408,),
            "vision_encoder.clip_projector.cross_attn.proj.weight": (768, 1408),
            "vision_proj.weight": (512, 768), "text_proj.weight": (512, 1024),
            "text_encoder.bert.encoder.layer.18.output.dense.weight": (1024, 4096)}.items():
        assert tuple(state[k].shape) == shape, k
    for k in ("blocks.0.attn.qkv.bias", "blocks.0.norm1.bias", "blocks.40.norm1.weight"):
        assert f"vision_encoder.{k}" not in state
    deeper = {"text_encoder.bert.encoder.layer.19.crossattention.self.key.weight": torch.ones(1)}
    again = iv2.internvideo2_model(state | deeper)
    assert again.state_dict().keys() == net.state_dict().keys()
    assert again.vision_encoder.blocks[0].attn.heads == 16


def test_internvideo2_layer_count_of_the_file():
    "Layers of BERT beyond those that are run are dropped, and nothing else is"
    state = standins.tiny_internvideo2()
    assert iv2.depth(state, "text_encoder.bert.encoder.layer") == 3
    net = iv2.internvideo2_model(state, **standins.TINY)
    assert net.text_encoder.config.num_hidden_layers == 2
    for key in ("vision_encoder.blocks.1.attn.k_norm.weight", "vision_encoder.img_pos_embed", "text_proj.bias",
                "text_encoder.bert.encoder.layer.1.output.dense.bias", "vision_encoder.pos_embed"):
        part = dict(state)
        del part[key]
        with pytest.raises(UserError, match=f"not the weights of internvideo2: .*{key}"):
            iv2.internvideo2_model(part, **standins.TINY)
    with pytest.raises(UserError, match="2 unknown .llama.a, llama.b."):
        iv2.internvideo2_model(state | {"llama.b": torch.ones(1), "llama.a": torch.ones(1)}, **standins.TINY)
    with pytest.raises(UserError, match="internvideo2: there is no tensor"):
        iv2.internvideo2_model(standins.tiny_viclip(), **standins.TINY)


@pytest.mark.parametrize("new", [1, 2, 4, 6, 8, 16])
def test_stretch(new):
    "Linear over time at half-sample centres, place by place; the class token stays"
    pos = torch.randn(1, 1 + 4*3, 5, generator=make_gen(0), dtype=torch.float64)
    got = iv2.stretch(pos, 4, new)
    grid = pos[0, 1:].unflatten(0, (4, 3))
    want = []
    for i in range(new):
        at = min(max((i + .5)*4/new - .5, 0), 3)
        lo = min(int(at), 2)
        want.append(grid[lo]*(1 - at + lo) + grid[lo + 1]*(at - lo))
    torch.testing.assert_close(got, torch.cat([pos[0, :1], *want])[None])


@torch.no_grad()
def test_internvideo2_frames_and_padding():
    rm = rc.build("internvideo2")
    tower = rm.vision_encoder
    x = torch.randn(1, 3, 8, 32, 32, generator=make_gen(0))
    assert tower(x[:, :, :1]).shape == tower(x).shape == (1, 24)
    before = [tower(x[:, :, :n]) for n in (1, 4)]
    tower.img_pos_embed.neg_()                 # a single frame has positions of its own
    after = [tower(x[:, :, :n]) for n in (1, 4)]
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[1], before[1])
    short, rm.facts = rm.text_features(["a dog"]), iv2.replace(rm.facts, tokens=7)
    rm._apply(lambda p: p)
    torch.testing.assert_close(rm.text_features(["a dog"]), short)


def test_internvideo2_file(tmp_path, monkeypatch):
    (tmp_path/"vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *rc.WORDS]))
    BertTokenizer(str(tmp_path/"vocab.txt")).save_pretrained(tmp_path)
    torch.save(dict(module=standins.tiny_internvideo2()), tmp_path/"i.pt")
    sizes = iv2.internvideo2_sizes
    monkeypatch.setattr(iv2, "internvideo2_sizes", lambda state, **_: sizes(state, **standins.TINY))
    for frames in (4, 8):
        rm = iv2.internvideo2(tmp_path/"i.pt", tmp_path, frames=frames, save_memory=True)
        assert rm.facts.frames == frames and rm.vision_encoder.save_memory
        assert rm(rc.clips(rm), rc.PROMPTS[:2]).shape == (2,)
    ids = rm.tokenizer("a dog").input_ids
    assert ids[0] == 2 and ids[-1] == 3 and rm.tokenizer.pad_token_id == 0
    with pytest.raises(UserError, match="internvideo2: no folder"): iv2.internvideo2(tmp_path/"i.pt", tmp_path/"nothing")
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer"): iv2.internvideo2(tmp_path/"i.pt", tmp_path/"empty")


# --- VideoPrism ----------------------------------------------------------------------------------

has_prism = pytest.mark.skipif(not hasattr(transformers, "VideoPrismClipModel"), reason="transformers has VideoPrism since 5.13")


def test_a_transformers_without_videoprism(monkeypatch, tmp_path):
    "The sentence names the version that is needed; the other rewards do not mind"
    monkeypatch.setattr(transformers, "VideoPrismClipModel", None, raising=False)
    with pytest.raises(UserError, match="needs transformers 5.13 or newer, but .* is installed"): prism.videoprism(tmp_path)
    assert "videoprism-base" in names.facts_table()


@has_prism
@pytest.mark.parametrize("large,millions,frames", [(False, 248, 16), (True, 580, 8)])
def test_videoprism_full_size(large, millions, frames):
    with torch.device("meta"): rm = prism.videoprism_full(large)
    assert round(sum(p.numel() for p in rm.parameters())/1e6) == millions
    assert (rm.facts.frames, rm.facts.size, rm.facts.tokens) == (frames, 288, 64)


@has_prism
def test_videoprism_folder(tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in rc.WORDS)]
    words = transformers.VideoPrismTokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], model_max_length=64)
    standins.tiny_videoprism(frames=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"): prism.videoprism(tmp_path, facts=prism.PRISM_L)
    words.save_pretrained(tmp_path)
    rm = prism.videoprism(tmp_path, facts=prism.PRISM_L, dtype=torch.bfloat16)
    assert rm.dtype == torch.bfloat16 and rm(rc.clips(rm), rc.PROMPTS[:2]).shape == (2,)
    with pytest.raises(UserError, match="looks at 16 frames but .* at 8"): prism.videoprism(tmp_path)
    standins.tiny_clip().save_pretrained(tmp_path/"other")
    with pytest.raises(UserError, match="videoprism-large"): prism.videoprism(tmp_path/"other", facts=prism.PRISM_L)


@has_prism
@torch.no_grad()
def test_videoprism_masks_the_padding():
    rm = rc.build("videoprism")
    u, rm.facts = rm.text_features(["a dog"]), prism.replace(rm.facts, tokens=7)
    rm._apply(lambda p: p)
    torch.testing.assert_close(rm.text_features(["a dog"]), u)


def test_video_rewards_by_name():
    with pytest.raises(UserError, match="viclip-l14: 8, videoprism-base: 16"):
        names.rewards_from(["viclip-l14", "videoprism-base"])
    with pytest.raises(UserError, match="no file 'x.pth'"): names.rewards_from(["viclip-b16@x.pth"])
