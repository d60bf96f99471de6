"The rewards: HPSv2, ViCLIP, and both towers of InternVideo2"
import torch
import torch.nn.functional as F
from golden_files import close, near, read
from transformers import CLIPTokenizer

from t2v_turbo import standins
from t2v_turbo.rewards import clip, loading, viclip
from t2v_turbo.rewards import internvideo2 as iv2
from t2v_turbo.teachers.base import tokenize
from t2v_turbo.text import clip_tokenizer, read_merges


def cosine(v, u): return F.normalize(v, dim=-1) @ F.normalize(u, dim=-1).T


def clip_ids(d, meta, words):
    "The ids of the recorded prompts, from the stock tokenizer with CLIP's vocabulary"
    def check(clip_vocabulary, tmp_path):
        ids = d["text.input_ids"]
        clip_tokenizer(read_merges(clip_vocabulary), words, ids.shape[1]).save_pretrained(tmp_path)
        assert torch.equal(tokenize(CLIPTokenizer.from_pretrained(tmp_path), meta["prompts"]), ids)
    return check


class Ids:
    "Stands in for a tokenizer: prompt `i` has the recorded ids of row `i`"
    pad_token_id = 0

    def __init__(self, ids): self.ids, self.model_max_length = ids, ids.shape[1]

    def __call__(self, prompts, **_): return dict(input_ids=self.ids[[int(p) for p in prompts]])


def hps_parts(path):
    "Letterbox, features and cosine for every recorded shape of image; token ids"
    d, state, meta = read(path, "model.")
    v, t = meta["config"]["vision_cfg"], meta["config"]["text_cfg"]
    images = sorted(k for k in d if k.startswith("image") and "." not in k)
    words = [str(i) for i in range(len(meta["prompts"]))]

    def reward():
        act = "quick_gelu" if meta["config"].get("quick_gelu") else "gelu"
        net = clip.open_clip_model(state, "HPSv2", head=v.get("head_width", 64),
                                   text_heads=t["heads"], act=act)
        rm = clip.CLIPReward(clip.HPS, net, Ids(d["text.input_ids"]), loading.letterbox)
        assert rm.facts.size == v["image_size"]
        return rm.frozen(torch.float32)

    def preprocessing():
        rm = reward()
        for k in images:
            x = rm.prepare(d[k].unsqueeze(2))[:, :, 0]
            near(x, d[f"{k}.preprocessed"], 2e-3)

    @torch.no_grad()
    def scores():
        rm = reward()
        close(F.normalize(rm.text(d["text.input_ids"]), dim=-1),
              F.normalize(d["text.features"], dim=-1))
        for k in images:
            x = d[f"{k}.preprocessed"].unsqueeze(2)
            close(F.normalize(rm.vision(x)[:, 0], dim=-1), F.normalize(d[f"{k}.features"], dim=-1))
            near(cosine(rm.vision(x)[:, 0], rm.text_features(words)), d[f"{k}.cosine"], 1e-4)

    @torch.no_grad()
    def reward_from_frames():
        rm = reward()
        for k in images:
            for j, p in enumerate(words):
                near(rm(d[k].unsqueeze(2), [p]*len(d[k])), d[f"{k}.cosine"][:, j], 1e-4)

    yield "preprocessing", preprocessing
    yield "scores", scores
    yield "reward_from_frames", reward_from_frames
    yield "token_ids", clip_ids(d, meta, t["vocab_size"])


def viclip_parts(path):
    "Video and text features, cosine, token ids"
    d, state, meta = read(path, "model.")
    heads = meta["vision"]["heads"], meta["text"]["transformer_heads"]
    videos = sorted({k.partition(".")[0] for k in d if k.startswith("video")})

    @torch.no_grad()
    def scores():
        rm = viclip.viclip_model(state, tokenizer=Ids(d["text.input_ids"]), heads=heads)
        rm = rm.frozen(torch.float32)
        assert rm.facts.frames == meta["vision"]["num_frames"]
        assert (rm.facts.size, rm.facts.tokens) == (meta["vision"]["input_resolution"],
                                                    meta["text"]["context_length"])
        u = rm.text(d["text.input_ids"])
        close(F.normalize(u, dim=-1), F.normalize(d["text.features"], dim=-1))
        for k in videos:
            x = d[f"{k}.normalized_frames"].transpose(1, 2)
            v = rm.vision(x)[:, 0]
            close(F.normalize(v, dim=-1), F.normalize(d[f"{k}.features"], dim=-1))
            near(cosine(v, u), d[f"{k}.cosine"], 1e-4)
            words = [str(i % len(u)) for i in range(len(x))]
            want = d[f"{k}.cosine"][range(len(x)), [int(w) for w in words]]
            near(rm.score(x, words), want, 1e-4)

    yield "scores", scores
    yield "token_ids", clip_ids(d, meta, meta["text"]["vocab_size"])


def internvideo2_vision_parts(path):
    "Pooled and projected features for every recorded number of frames"
    d, state, meta = read(path, "checkpoint.")
    cfg, vision = meta["config"], "vision_encoder."
    runs = sorted({k.partition(".")[0] for k in d if k.endswith("normalized_frames")})
    trained = round((state[vision + "pos_embed"].shape[1] - 1)
                    / (state[vision + "img_pos_embed"].shape[1] - 1))
    words = {k: v for k, v in standins.tiny_internvideo2().items() if k.startswith("text_")}
    words |= {"text_proj.weight": torch.zeros(len(state["vision_proj.weight"]), 32),
              "text_proj.bias": torch.zeros(len(state["vision_proj.weight"]))}

    @torch.no_grad()
    def features():
        heads = cfg["num_heads"], cfg["attn_pool_num_heads"], 2
        rm = iv2.internvideo2_model(state | words, heads=heads, layers=2, frames=trained)
        rm = rm.frozen(torch.float32)
        assert rm.facts.size == cfg["img_size"]
        for k in runs:
            x = d[f"{k}.normalized_frames"].transpose(1, 2)
            close(rm.vision_encoder(x), d[f"{k}.pooled"])
            got, want = rm.vision(x)[:, 0], d[f"{k}.features"]
            close(F.normalize(got, dim=-1), F.normalize(want, dim=-1))

    yield "features", features


def internvideo2_text_parts(path):
    "BERT's first state after the fusion layer, and the projected features"
    d, state, meta = read(path, "checkpoint.")
    cfg = meta["config"]
    eyes = {k: v for k, v in standins.tiny_internvideo2().items() if k.startswith("vision_")}
    dim = len(state["text_proj.weight"])
    eyes |= {"vision_proj.weight": torch.zeros(dim, 24), "vision_proj.bias": torch.zeros(dim)}

    @torch.no_grad()
    def features():
        heads = 2, 2, cfg["num_attention_heads"]
        rm = iv2.internvideo2_model(state | eyes, heads=heads, layers=cfg["fusion_layer"])
        rm = rm.frozen(torch.float32)
        ids, mask = d["text.input_ids"], d["text.attention_mask"]
        first = rm.first_state(ids, mask)
        close(first, d["text.cls"])
        close(F.normalize(rm.text_proj(first), dim=-1), d["text.features"])

    yield "features", features


PARTS = dict(hps=hps_parts, viclip=viclip_parts, internvideo2_vision=internvideo2_vision_parts,
             internvideo2_text=internvideo2_text_parts)
