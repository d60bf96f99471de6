"The teachers: VideoCrafter2, ModelScopeT2V, their LoRA lists, and one whole training step"
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from golden_files import FOLDER, close, near, read
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2v_turbo.consistency import boundary, cd_loss, w_embedding
from t2v_turbo.core import expand_to
from t2v_turbo.schedule import Schedule, vp_abar
from t2v_turbo.solver import DDIM, guided_step
from t2v_turbo.teachers import published as pub
from t2v_turbo.teachers import videocrafter2 as vc2
from t2v_turbo.text import clip_tokenizer, read_merges


def lora_of(meta, unet, base):
    "The recorded list with its names"
    return pub.name_lora(pub.read_lora(FOLDER/meta["lora_file"]), unet, base)


def adapt(unet, named):
    "Put the named list into the UNet as PEFT adapters; every tensor must find its place"
    inject_adapter_in_model(pub.lora_config(named), unet)
    told = set_peft_model_state_dict(unet, pub.to_peft(named))
    assert not told.unexpected_keys and not [k for k in told.missing_keys if "lora_" in k]


def ms_student(path):
    "UNet with its recorded w-projection, and its named LoRA"
    d, state, meta = read(path, "unet.")
    unet = UNet3DConditionModel.from_config(meta["config"]).eval()
    unet.load_state_dict(state)
    return unet, lora_of(meta, unet, "ms")


def ms_unet_parts(path):
    "ModelScope's student: without LoRA, with the list merged, and with the list as adapters"
    d, _, _ = read(path, "unet.")
    x = d["io.x"], d["io.t"], d["io.context"], None, d["io.w_embedding"]

    @torch.no_grad()
    def plain(): close(ms_student(path)[0](*x).sample, d["io.out_nolora"])

    @torch.no_grad()
    def merged():
        unet, named = ms_student(path)
        pub.merge_lora(unet, named)
        close(unet(*x).sample, d["io.student_out"])

    @torch.no_grad()
    def adapters():
        unet, named = ms_student(path)
        adapt(unet, named)
        close(unet(*x).sample, d["io.student_out"])

    yield "plain", plain
    yield "merged", merged
    yield "adapters", adapters


def vc2_student(path):
    "Converted UNet with its recorded w-projection, named LoRA, and the fps MLP"
    d, state, meta = read(path, "unet.")
    state["time_cond_proj.weight"] = d["student.time_cond_proj.weight"]
    config, new = vc2.unet_from_vc2(state)
    unet = UNet3DConditionModel.from_config(config).eval()
    unet.load_state_dict(new)
    mlp = {k: v for k, v in state.items() if k.startswith(("fps_embedding.", "time_embed.2.bias"))}
    return unet, lora_of(meta, unet, "vc2"), mlp


def vc2_unet_parts(path):
    "The converted UNet; its LoRA list, layer by layer; the student, list merged and as adapters"
    d, state, meta = read(path, "unet.")
    fps = d["io.fps"].flatten().expand(len(d["io.x"])).tolist()

    def check(unet, mlp, want, emb=None):
        "Clip by clip, because a converted UNet holds one frame rate at a time"
        bias = unet.time_embedding.linear_2
        bias, got = getattr(bias, "base_layer", bias).bias, []
        for i, rate in enumerate(fps):
            bias.copy_(vc2.fps_bias(mlp, rate))
            x, t, ctx = (d[f"io.{k}"][i:i+1] for k in ("x", "t", "context"))
            got.append(unet(x, t, ctx, timestep_cond=None if emb is None else emb[i:i+1]).sample)
        close(torch.cat(got), want)

    @torch.no_grad()
    def plain():
        cfg = meta["config"]
        config, new = vc2.unet_from_vc2(state, fps[0])
        got = [config[k] for k in ("block_out_channels", "layers_per_block", "attention_head_dim",
                                   "cross_attention_dim", "time_cond_proj_dim")]
        assert got == [[cfg["model_channels"]*m for m in cfg["channel_mult"]],
                       cfg["num_res_blocks"], cfg["num_head_channels"], cfg["context_dim"], None]
        unet = UNet3DConditionModel.from_config(config).eval()
        unet.load_state_dict(new)
        assert torch.equal(unet.time_embedding.linear_2.bias, vc2.fps_bias(state, fps[0]))
        check(unet, state, d["io.out"])

    def lora_layout():
        student = state | {"time_cond_proj.weight": d["student.time_cond_proj.weight"]}
        config, _ = vc2.unet_from_vc2(student)
        assert config["time_cond_proj_dim"] == student["time_cond_proj.weight"].shape[1]
        lora = torch.load(FOLDER/meta["lora_file"], weights_only=True)
        layers = vc2.vc2_lora_layers(config)
        assert len(lora) == 2*len(layers)
        for up, down, name in zip(lora[::2], lora[1::2], layers):
            assert (up.shape[0], *down.shape[1:]) == tuple(student[f"{name}.weight"].shape), name

    @torch.no_grad()
    def merged():
        unet, named, mlp = vc2_student(path)
        mlp = pub.merge_lora(unet, named, mlp, fps[0])
        assert torch.equal(unet.time_embedding.linear_2.bias, vc2.fps_bias(mlp, fps[0]))
        check(unet, mlp, d["io.student_out"], d["io.w_embedding"])

    @torch.no_grad()
    def adapters():
        unet, named, mlp = vc2_student(path)
        adapt(unet, {n: pair for n, pair in named.items() if n not in pub.FPS})
        check(unet, pub.merge_fps(named, mlp), d["io.student_out"], d["io.w_embedding"])

    yield "plain", plain
    yield "lora_layout", lora_layout
    yield "merged", merged
    yield "adapters", adapters


def vc2_vae_parts(path):
    "The converted VAE: moments and decoded frames"
    d, state, meta = read(path, "first_stage_model.")

    @torch.no_grad()
    def check():
        config, new = vc2.vae_from_vc2(state)
        cfg = meta["ddconfig"]
        got = [config[k] for k in ("block_out_channels", "layers_per_block", "latent_channels")]
        assert got == [[cfg["ch"]*m for m in cfg["ch_mult"]], cfg["num_res_blocks"],
                       cfg["z_channels"]]
        vae = AutoencoderKL.from_config(config).eval()
        vae.load_state_dict(new)
        close(vae.encode(d["io.image"]).latent_dist.parameters, d["io.moments"])
        close(vae.decode(d["io.latent"]).sample, d["io.decoded"])

    yield "moments_and_frames", check


def vc2_text_parts(path):
    "The converted text tower, and the token ids of its tokenizer"
    d, state, meta = read(path, "cond_stage_model.model.")

    @torch.no_grad()
    def embeddings():
        cfg = meta["config"]["text_cfg"]
        config, new = vc2.text_from_vc2(state, heads=cfg["heads"])
        assert config["num_hidden_layers"] == cfg["layers"] - 1
        text = CLIPTextModel(CLIPTextConfig(**config)).eval()
        text.load_state_dict(new)
        near(text(d["io.input_ids"]).last_hidden_state, d["io.prompt_embeds"])

    def token_ids(clip_vocabulary, tmp_path):
        words, length = len(state["token_embedding.weight"]), d["io.input_ids"].shape[1]
        merges = read_merges(clip_vocabulary)
        clip_tokenizer(merges, words, length).save_pretrained(tmp_path)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
        ids = tokenizer(meta["prompts"], padding="max_length", truncation=True, return_tensors="pt")
        assert torch.equal(ids.input_ids, d["io.input_ids"])
        assert tokenizer("wow!").input_ids[-2] == 256 and tokenizer.pad_token_id == 0

    yield "embeddings", embeddings
    yield "token_ids", token_ids


class Fps:
    "The fps MLP beside the time embedding, so that its LoRA trains too; `self.rates` is `(b,)`"
    def __init__(self, unet, mlp):
        layers = [nn.Linear(*mlp[f"{n}.weight"].T.shape) for n in pub.FPS]
        unet.fps_embedding = nn.Sequential(layers[0], nn.SiLU(), layers[1])
        unet.fps_embedding.load_state_dict({k.removeprefix("fps_embedding."): v
                                            for k, v in mlp.items() if k.startswith("fps_")})
        with torch.no_grad(): unet.time_embedding.linear_2.bias.copy_(mlp["time_embed.2.bias"])
        unet.time_embedding.register_forward_hook(
            lambda m, a, out: out + unet.fps_embedding(unet.time_proj(self.rates).float()))


def cd_step_parts(path):
    "One whole step: noise, teacher, solver, target, loss, and the gradient over all LoRA weights"
    d, _, meta = read(path, "")

    def check():
        base = "ms" if meta["unet_file"].startswith("ms_") else "vc2"
        unet, _, *mlp = dict(ms=ms_student, vc2=vc2_student)[base](FOLDER/meta["unet_file"])
        named, n, width = lora_of(meta, unet, base), len(d["z0"]), unet.config.time_cond_proj_dim
        fps = Fps(unet, *mlp) if mlp else SimpleNamespace()
        adapt(unet, named)
        sched = Schedule(vp_abar())
        ddim = DDIM(sched, int(meta["ddim_timesteps"]))
        rate, emb = d.get("fps", torch.tensor(16)).flatten().expand(n), w_embedding(d["w"], width)

        def predict(zt, t, ctx, rates, cond=None):
            fps.rates = rates
            return sched.x0_eps(zt, unet(zt, t, ctx, timestep_cond=cond).sample, t, "epsilon")

        def teacher(zt, t, ctx):       # as published, the null prompt runs at the default fps
            return predict(zt, t, ctx, torch.cat([rate, torch.full_like(rate, 16)]))

        def student(zt, t):
            x0, _ = predict(zt, t, d["context"], rate, emb)
            skip, out = boundary(t, float(meta["sigma_data"]), float(meta["timestep_scaling"]))
            return expand_to(skip, zt)*zt + expand_to(out, zt)*x0

        def adapters(on):
            for m in unet.modules():
                if isinstance(m, BaseTunerLayer): m.enable_adapters(on)

        t, t_prev = ddim.t(d["index"]), ddim.t_prev(d["index"])
        assert torch.equal(t, d["start_timesteps"]) and torch.equal(t_prev, d["timesteps"])
        zt = sched.add_noise(d["z0"], d["noise"], t)
        close(zt, d["z_t"])
        with torch.no_grad():
            adapters(False)
            x_prev = guided_step(ddim, teacher, zt, d["index"], d["w"], d["context"],
                                 d["uncond_context"])
            close(x_prev, d["x_prev"])
            adapters(True)
            target = student(x_prev, t_prev)
            close(target, d["target"])
        unet.requires_grad_(False)
        lora = [p.requires_grad_() for name, p in unet.named_parameters() if "lora_" in name]
        pred = student(zt, t)
        close(pred.detach(), d["model_pred"])
        loss = cd_loss(pred, target, float(meta["huber_c"])).mean()
        close(loss.detach(), d["loss"])
        loss.backward()
        assert len(lora) == 2*len(named) and all(p.grad is not None for p in lora)
        close(torch.stack([p.grad.norm() for p in lora]).norm(), d["grad_norm"])

    yield "step", check


PARTS = dict(ms_unet=ms_unet_parts, vc2_unet=vc2_unet_parts, vc2_vae=vc2_vae_parts,
             vc2_text=vc2_text_parts, cd_step=cd_step_parts)
