"LoRA files of random numbers, written as the tools of others write them"
import json

import torch
from safetensors.torch import save_file
from torch import nn

from t2v_turbo.core import make_gen
from t2v_turbo.teachers.lora import wan_name
from t2v_turbo.teachers.videocrafter2 import unet_table

ALPHA = 2.          # of the tools that store one


def random_lora(net, layers, seed=0, rank=3, size=.3):
    "`{layer: (A, B)}`"
    gen, shape = make_gen(seed), {n: net.get_submodule(n).weight.shape for n in layers}
    return {n: (size*torch.randn(rank, *s[1:], generator=gen), size*torch.randn(s[0], rank, *(1 for _ in s[2:]), generator=gen))
            for n, s in shape.items()}


def in_blocks(net):
    "The layers that trainers of style LoRAs choose: attention and feed-forward"
    return [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and (".attn" in n or ".ff" in n)]


def vc2_names(unet):
    "Name of a layer in the weights of VideoCrafter2's authors"
    return {v.removesuffix(".weight"): k.removesuffix(".weight") for k, (v,) in unet_table(unet, {}).items()}


def diffusers(lora, file, net, part="transformer"):
    save_file({f"{part}.{n}.lora_{k}.weight": v for n, ab in lora.items() for k, v in zip("AB", ab)}, file)


def old_diffusers(lora, file, net, part="unet"):
    "Names of attention processors, with `to_out` without a number"
    def name(n): return n.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.").replace("to_out.0", "to_out")
    join = lambda n: "_lora." if ".processor." in name(n) else ".lora."
    save_file({f"{part}.{name(n)}{join(n)}{k}.weight": v for n, ab in lora.items() for k, v in zip(("down", "up"), ab)}, file)


def peft(lora, file, net, part="transformer"):
    "With `adapter_config.json` beside, whose alpha is `ALPHA`"
    file = file.with_name("adapter_model.safetensors")
    save_file({f"base_model.model.{n}.lora_{k}.weight": v for n, ab in lora.items() for k, v in zip("AB", ab)}, file)
    rank = len(next(iter(lora.values()))[0])
    file.with_name("adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=rank, lora_alpha=ALPHA, target_modules=[*lora])))


def _up_and_down(lora, file, name):
    save_file({f"{name(n)}.{k}": v for n, (a, b) in lora.items()
               for k, v in {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(ALPHA)}.items()}, file)


def kohya(lora, file, net, part="transformer"):
    name = wan_name if part == "transformer" else str
    _up_and_down(lora, file, lambda n: "lora_unet_" + name(n).replace(".", "_"))


def comfyui(lora, file, net, part="transformer"):
    name = wan_name if part == "transformer" else vc2_names(net).__getitem__
    _up_and_down(lora, file, lambda n: f"diffusion_model.{name(n)}")


NAMINGS = dict(diffusers=diffusers, old_diffusers=old_diffusers, peft=peft, kohya=kohya, comfyui=comfyui)
NO_ALPHA = "diffusers", "old_diffusers"


def write(lora, how, folder, net, part="transformer"):
    "A file in a new folder; its path, and the factor that the tool means"
    folder.mkdir(parents=True, exist_ok=True)
    NAMINGS[how](lora, folder/"style.safetensors", net, part)
    rank = len(next(iter(lora.values()))[0])
    return next(folder.glob("*.safetensors")), 1. if how in NO_ALPHA else ALPHA/rank
