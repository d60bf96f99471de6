"""A stand-in for the Hugging Face hub on this machine, and small repositories under the published names

`python tests/hub.py FOLDER PORT` makes the repositories in FOLDER, if it is not there, and serves them; then, in another shell,
`HF_ENDPOINT=http://127.0.0.1:PORT HF_HOME=/tmp/home t2v-turbo ...`. A repository is FOLDER/owner/name, one of its other
revisions is FOLDER/owner/name@revision."""
import hashlib
import json
import os
import shutil
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

LARGE = {".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".msgpack", ".h5", ".onnx"}
GATED = "GatedRepo", "Access to this model is restricted and you are not in the authorized list."
MISSING = "RepoNotFound", "Repository not found"


def digest(path, how=hashlib.sha256): return how(path.read_bytes()).hexdigest()


class Hub(ThreadingHTTPServer):
    "Serves the repositories of a folder on 127.0.0.1; `log` holds `(method, path, status, bytes sent)`"
    daemon_threads = True

    def __init__(self, folder, port=0):
        super().__init__(("127.0.0.1", port), Answer)
        self.folder, self.log, self.url = Path(folder), [], f"http://127.0.0.1:{self.server_address[1]}"
        self.gated, self.private = set(), set()       # names of repositories
        self.status = None                            # answer everything with it, e.g. 429 or 503
        self.cut = {}                                 # file name: bytes after which the connection breaks off, once
        self.then = None                              # the `status` from such a break on

    def files(self, at): return sorted(f for f in at.rglob("*") if f.is_file())

    def commit(self, at):
        names = "".join(f"{f.relative_to(at)} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in self.files(at))
        return hashlib.sha1(names.encode()).hexdigest()

    def find(self, repo, revision="main"):
        "The folder of a revision: main, a branch beside it, or a commit of either"
        at = self.folder/repo
        if not at.is_dir() or repo in self.private: return None, MISSING
        for other in (at, *at.parent.glob(f"{at.name}@*")):
            if revision in (self.commit(other), other.name.partition("@")[2] or "main"): return other, None
        return None, ("RevisionNotFound", f"Invalid rev id: {revision}")

    def fetched(self, sent=True):
        "Names of the files whose bytes were sent, or asked for"
        kinds = ("GET",) if sent else ("GET", "HEAD")
        return sorted({p.split("/resolve/")[1].partition("/")[2] for m, p, s, n in self.log if "/resolve/" in p and m in kinds
                       and (n or not sent) and s < 300})

    def handle_error(self, request, client_address): pass        # a client that went away


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def send(self, status, body=b"", **head):
        self.send_response(status)
        head = {"Content-Type": "application/json", "Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in head.items()}
        for k, v in head.items(): self.send_header(k, str(v))
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body
        cut = self.server.cut.pop(self.path.rpartition("/")[2], None) if sent else None
        self.server.log.append((self.command, self.path, status, len(sent[:cut])))
        self.wfile.write(sent[:cut])
        if cut is not None: self.server.status = self.server.then; self.wfile.flush(); self.close_connection = True; self.connection.shutdown(2)

    def refuse(self, status, code, text):
        self.send(status, json.dumps(dict(error=text)).encode(), X_Error_Code=code, X_Error_Message=text)

    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer()

    def answer(self):
        hub, url = self.server, urlparse(self.path)
        if hub.status: return self.refuse(hub.status, "", "not now")
        parts = unquote(url.path).strip("/").split("/")
        if parts[:2] == ["api", "models"]: return self.api("/".join(parts[2:4]), parts[4:], "blobs" in url.query)
        if "resolve" in parts[2:3]: return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.refuse(404, "", "not found")

    def api(self, repo, rest, blobs):
        kind, revision = rest[0] if rest else "", rest[1] if len(rest) > 1 else "main"
        at, wrong = self.server.find(repo, revision)
        if wrong: return self.refuse(401 if wrong is MISSING else 404, *wrong)
        def about(f):
            size, lfs = f.stat().st_size, dict(lfs=dict(sha256=digest(f), oid=digest(f), size=f.stat().st_size, pointerSize=130))
            return dict(size=size, blobId=digest(f, hashlib.sha1), oid=digest(f, hashlib.sha1)) | (lfs if f.suffix in LARGE else {})
        name = lambda f: f.relative_to(at).as_posix()
        if kind == "tree": told = [dict(type="file", path=name(f), **about(f)) for f in self.server.files(at)]
        else: told = dict(_id="0", id=repo, modelId=repo, sha=self.server.commit(at), private=False, disabled=False, tags=[], downloads=0,
                          likes=0, gated="manual" if repo in self.server.gated else False, lastModified="2024-01-01T00:00:00.000Z",
                          siblings=[dict(rfilename=name(f), **(about(f) if blobs else {})) for f in self.server.files(at)])
        self.send(200, json.dumps(told).encode())

    def file(self, repo, revision, name):
        at, wrong = self.server.find(repo, revision)
        if wrong: return self.refuse(401 if wrong is MISSING else 404, *wrong)
        if repo in self.server.gated: return self.refuse(403, *GATED)
        if not (at/name).is_file(): return self.refuse(404, "EntryNotFound", "Entry not found")
        body, head = (at/name).read_bytes(), dict(X_Repo_Commit=self.server.commit(at), Accept_Ranges="bytes",
                                                  Content_Type="application/octet-stream", ETag=f'"{digest(at/name)}"')
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first: return self.send(200, body, **head)
        last = int(last or len(body) - 1)
        self.send(206, body[int(first):last + 1], **head, Content_Range=f"bytes {first}-{last}/{len(body)}")


@contextmanager
def serve(folder, port=0):
    "A running `Hub`"
    hub = Hub(folder, port)
    thread = threading.Thread(target=hub.serve_forever, args=(.05,), daemon=True)
    thread.start()
    try: yield hub
    finally: hub.shutdown(); hub.server_close(); thread.join()


def environment(hub, home, **more):
    "Of a process that takes `hub` for the hub, with a cache of its own"
    gone = {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_DISABLE_PROGRESS_BARS"}
    return {k: v for k, v in os.environ.items() if k not in gone} | dict(
        HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1") | more


# ---- small repositories under the published names

def in_all_formats(folder, halves=True):
    "Beside every safetensors file of a part: a .bin, both in float16 as well, and files of other frameworks"
    import torch
    from safetensors.torch import load_file, save_file
    for file in [*folder.glob("*/*.safetensors"), *folder.glob("*.safetensors")]:
        state, pt = load_file(file), file.name.replace("model.safetensors", "model.bin").replace("model.bin", "pytorch_model.bin")
        pt = pt if "diffusion" not in pt else "diffusion_pytorch_model.bin"
        torch.save(state, file.with_name(pt))
        (file.with_name("flax_model.msgpack")).write_bytes(b"flax")
        if not halves: continue
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        save_file(half, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), dict(format="pt"))
        torch.save(half, file.with_name(pt.replace(".bin", ".fp16.bin")))


def with_old_tokenizer(folder):
    "vocab.json and merges.txt, as older versions wrote them, instead of tokenizer.json"
    one = json.loads((folder/"tokenizer.json").read_text())["model"]
    (folder/"tokenizer.json").unlink()
    (folder/"vocab.json").write_text(json.dumps(one["vocab"]))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in one["merges"]]
    (folder/"merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))


def modelscope(folder):
    from t2v_turbo.standins import tiny_modelscope
    tiny_modelscope(folder)
    in_all_formats(folder)
    with_old_tokenizer(folder/"tokenizer")
    (folder/"README.md").write_text("A text-to-video model")
    (folder/"text2video_pytorch_model.pth").write_bytes(b"an older file")
    (folder/"safety_checker").mkdir()
    (folder/"safety_checker/model.safetensors").write_bytes(b"not needed")


def wan(folder, large=False):
    "Wan's layout: one precision, the transformer in shards with an index; Wan 2.1, or 2.2 TI2V-5B"
    from diffusers import WanTransformer3DModel

    from t2v_turbo.standins import tiny_wan, tiny_wan22
    from t2v_turbo.teachers.wan import save_wan
    save_wan(tiny_wan22() if large else tiny_wan(), folder)
    (folder/"teacher.json").rename(folder/"teacher.json.was")       # ours; the published folder has none
    about = json.loads((folder/"teacher.json.was").read_text()); (folder/"teacher.json.was").unlink()
    net = WanTransformer3DModel.from_pretrained(folder/"transformer")
    shutil.rmtree(folder/"transformer")
    net.save_pretrained(folder/"transformer", max_shard_size="40KB")
    (folder/"assets").mkdir(); (folder/"assets/logo.png").write_bytes(b"png")
    return about


def two_transformers(folder):
    "The index of Wan 2.2 A14B beside the files of a smaller model: whoever fetches its weights has not read the index"
    wan(folder)
    index = json.loads((folder/"model_index.json").read_text()) | dict(transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=.875)
    (folder/"model_index.json").write_text(json.dumps(index))
    shutil.copytree(folder/"transformer", folder/"transformer_2")


def lora_list(folder, base="ms", seed=0):
    "T2V-Turbo's unnamed list for the UNet of a folder"
    import torch

    from t2v_turbo.core import make_gen
    from t2v_turbo.teachers.published import layer_shapes, load_unet, with_w_projection
    gen, out = make_gen(seed), []
    for o, i, *k in layer_shapes(with_w_projection(load_unet(folder)), base).values():
        r = min(4, o, i)
        out += [.02*torch.randn(o, r, *[1]*len(k), generator=gen), .02*torch.randn(r, i, *k, generator=gen)]
    return out


def clip_folder(folder, halves=False):
    "A CLIP in transformers' format, with the files of other frameworks beside"
    from t2v_turbo.standins import tiny_clip
    from t2v_turbo.text import clip_tokenizer
    tiny_clip(words=514).save_pretrained(folder)
    clip_tokenizer([], 514).save_pretrained(folder)
    in_all_formats(folder, halves)
    for n in ("tf_model.h5", "open_clip_pytorch_model.bin"): (folder/n).write_bytes(b"another format")


def hps(path):
    "HPSv2.1's file: heads of 80 and 64 channels, half precision, nested"
    import torch
    from transformers import CLIPConfig, CLIPModel

    from t2v_turbo.rewards.clip import open_clip_table
    from t2v_turbo.weights import published
    torch.manual_seed(0)
    each = dict(num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, hidden_act="gelu")
    net = CLIPModel(CLIPConfig(
        projection_dim=24, vision_config=dict(each, hidden_size=160, image_size=32, patch_size=8), text_config=dict(
            each, hidden_size=128, vocab_size=514, max_position_embeddings=77, eos_token_id=513, bos_token_id=512))).half()
    path.parent.mkdir(parents=True)
    torch.save(dict(state_dict=published(net, open_clip_table(net.config))), path)


def repositories(folder):
    "All of them; returns `folder`"
    import torch

    from t2v_turbo.standins import tiny_imagereward, tiny_sana, tiny_viclip, tiny_videocrafter2
    folder = Path(folder)
    modelscope(folder/"ali-vilab/text-to-video-ms-1.7b")
    wan(folder/"Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    wan(folder/"Wan-AI/Wan2.2-TI2V-5B-Diffusers", large=True)
    two_transformers(folder/"Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    tiny_sana(folder/"Efficient-Large-Model/SANA-Video_2B_480p_diffusers")
    for name in ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "yuvalkirstain/PickScore_v1", "openai/clip-vit-large-patch14"): clip_folder(folder/name)
    hps(folder/"xswu/HPSv2/HPS_v2.1_compressed.pt")
    for name, state in {"jiachenli-ucsb/T2V-Turbo-MS/unet_lora.pt": lora_list(folder/"ali-vilab/text-to-video-ms-1.7b"),
                        "VideoCrafter/VideoCrafter2/model.ckpt": dict(state_dict=tiny_videocrafter2()),
                        "THUDM/ImageReward/ImageReward.pt": tiny_imagereward(),
                        "OpenGVLab/ViCLIP/ViClip-InternVid-10M-FLT.pth": tiny_viclip()}.items():
        (folder/name).parent.mkdir(parents=True)
        torch.save(state, folder/name)
    return folder


def students(folder):
    "Besides `repositories`: the published students of VideoCrafter2, and CLIP's merges; returns `folder`"
    import torch
    from diffusers import UNet3DConditionModel

    from t2v_turbo.core import make_gen
    from t2v_turbo.standins import tiny_videocrafter2
    from t2v_turbo.teachers.published import layer_shapes
    from t2v_turbo.teachers.videocrafter2 import PREFIXES, stock_network, unet_config
    folder, gen = Path(folder), make_gen(3)
    net = {k.removeprefix(PREFIXES["unet"]): v for k, v in tiny_videocrafter2().items() if k.startswith(PREFIXES["unet"])}
    draw = lambda *shape: .02*torch.randn(*shape, generator=gen)
    shapes = layer_shapes(stock_network(UNet3DConditionModel, unet_config(net) | dict(time_cond_proj_dim=256)), "vc2").values()
    pairs = [v for o, i, *k in shapes for r in [min(4, o, i)] for v in (draw(o, r, *[1]*len(k)), draw(r, i, *k))]
    merged = net | {"time_cond_proj.weight": 10*draw(32, 256)}
    motion = {"motion_cond_proj.weight": 10*draw(32, 256), "combine_proj.weight": 10*draw(32, 64)}
    for name, what in {"-VC2/unet_lora.pt": pairs, "-VC2-Merged/t2v_turbo_vc2.pt": merged, "-v2/unet_mg.pt": merged | motion,
                       "-v2-no-MG/unet_no_mg.pt": merged}.items():
        path = folder/f"jiachenli-ucsb/T2V-Turbo{name}"
        path.parent.mkdir(parents=True)
        torch.save(what, path)
    (folder/"openai/clip-vit-large-patch14/merges.txt").write_text("#version: 0.2\np a\npa n\npan d\npand a</w>\na n\nan d</w>\n")
    return folder


if __name__ == "__main__":
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if not folder.is_dir(): repositories(folder)
    print(f"HF_ENDPOINT=http://127.0.0.1:{port}", flush=True)
    Hub(folder, port).serve_forever()
