"`--dry_run`: the sentences of the run itself, nothing written, nothing fetched, and two steps of the same classes"
import ast
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import hub
import loras
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from t2v_turbo import cli, dryrun, engines, train
from t2v_turbo.checkpoints import claim
from t2v_turbo.cli import main
from t2v_turbo.core import write_video
from t2v_turbo.data.tars import write_shards
from t2v_turbo.files import UserError
from t2v_turbo.standins import tiny_modelscope
from t2v_turbo.teachers.folders import load_teacher

PACKAGE = Path(dryrun.__file__).parent
SMALL = ["--batch", "2", "--rank", "2", "--eval_every", "0", "--track", ""]


def tree(folder): return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in Path(folder).rglob("*"))


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    "A folder with good and bad input of every kind"
    at = tmp_path_factory.mktemp("input")
    for name in ("clips", "both", "lonely"):
        (at/name).mkdir()
        for i in range(2):
            write_video(at/name/f"{i}.mp4", torch.rand(3, 8, 32, 32))
            (at/name/f"{i}.txt").write_text("a blue car moving up in the desert")
    (at/"both/a.tar").write_bytes(b"")
    (at/"lonely/captions.csv").write_text("file,caption\n0.mp4,noise\ngone.mp4,noise\n")
    for name in ("empty", "model"): (at/name).mkdir()
    (at/"prompts.txt").write_text("a red fish moving left in the sea\n")
    (at/"blank.txt").touch()
    (at/"latin1.txt").write_bytes("un caf\xe9".encode("latin-1"))
    (at/"odd.pt").write_bytes(b"no weights")
    tiny_modelscope(at/"ms")
    for kind, more in (("text", []), ("latents", []), ("pairs", ["--k", "20"])):
        assert main(["cache", kind, str(at/kind), "--samples", "4", "--batch", "2", *more]) == 0
    net = load_teacher("tiny").denoiser
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and not n.endswith("cond_proj")][-3:]
    loras.diffusers(loras.random_lora(net, layers), at/"style.safetensors", net)
    save_file({"transformer.nowhere.lora_A.weight": torch.ones(1, 3), "transformer.nowhere.lora_B.weight": torch.ones(3, 1)}, at/"wrong.safetensors")
    quick = ["--steps", "1", *SMALL, "--repeats", "1"]
    assert main(["distill", "--out", str(at/"made"), *quick, "--data", str(at/"prompts.txt"), "--samples", "2", "--teacher_steps", "2"]) == 0
    assert main(["cache", "text", str(at/"few"), "--data", str(at/"prompts.txt")]) == 0
    assert main(["distill", "--out", str(at/"run"), "--steps", "1", *SMALL, "--repeats", "1", "--data", str(at/"clips")]) == 0
    for name, text in dict(later=dict(format=99), earlier=dict(format=1, step=0)).items():
        state = torch.load(at/"run/checkpoints/step-00000001.pt", weights_only=True) | text
        (at/name/"checkpoints").mkdir(parents=True)
        torch.save(state, at/name/"checkpoints/step-00000001.pt")
    for name in ("cut", "folder"): (at/name/"checkpoints").mkdir(parents=True)
    (at/"cut/checkpoints/step-00000001.pt").write_bytes(b"PK\x03\x04")
    (at/"folder/log.jsonl").mkdir()
    return at


# words: what the sentence holds. {at} is the folder of the fixture; --out is {at}/new unless it is given
OF_THE_RUN = {
    "--steps 0": "steps is 0", "--batch 0": "batch is 0", "--accumulate 0": "accumulate is 0", "--workers 0": "workers is 0", "--save_every 0": "save_every is 0",
    "--max_skipped 0": "max_skipped is 0", "--mix -1": "mix is -1", "--rank -1": "rank is -1", "--out ''": "out is empty", "--lr 0": "lr is 0", "--clip 0": "clip is 0",
    "--seed -1": "seed is -1", "--ema 1": "ema is 1", "--dtype int8": "dtype 'int8'", "--optimizer sgd": "optimizer 'sgd'", "--lr_schedule up": "lr_schedule 'up'",
    "--missing x": "missing 'x'", "--track paper": "track 'paper'", "--save_memory x": "save_memory 'x'", "--keep 0": "keep is 0",
    "--beta_img -1": "beta_img is -1", "--k 7": "k", "--w_min 3 --w_max 1": "w range", "--image_frames 0": "image_frames is 0", "--video_frames -1": "video_frames is -1",
    "--huber_c 0": "huber_c", "--window -1": "window", "--shape x": "shape", "--repeats 0": "repeats is 0", "--teacher_w nan": "teacher_w is nan",
    "--eval_every -1": "eval_every is -1", "--clips_each 0": "clips_each is 0", "--patience 0": "patience is 0", "--student_w nan": "student_w is nan",
    "--student_steps 17": "student_steps is 17", "--on_hacking x": "on_hacking 'x'", "--prompts {at}/none.txt": "no prompt file", "--prompts {at}/latin1.txt": "is not UTF-8",
    "--held_out tiny-video --eval_every 0": "would never be asked", "--held_out x": "reward 'x' is unknown", "--reference {at}/none": "no student in",
    "--reward x": "reward 'x' is unknown", "--reward tiny-image=x": "is not a number", "--reward tiny-image,tiny-image,tiny-video": "more than once",
    "--reward tiny-image,tiny-video --vocabulary x": "a vocabulary was given", "--reward viclip-l14,videoprism-base": "different numbers of frames",
    "--reward viclip-l14 --video_frames 4": "viclip-l14 looks at 8 frames", "--reward viclip-l14@{at}/none.pth": "none.pth", "--reward hpsv2.1@{at}/odd.pt": "odd.pt",
    "--reward aesthetic --beta_vid 0": "give the path of the head", "--teacher {at}/ms": "has no image and no video reward", "--teacher {at}/none": "there is no folder",
    "--teacher {at}/model": "is not a diffusers model", "--frames 16": "frames 16 is not possible", "--height 32 --width 32": "is not possible",
    "--teacher {at}/ms --height 30 --beta_img 0 --beta_vid 0": "multiples of 8", "--teacher {at}/ms --scale_x0 1 --beta_img 0 --beta_vid 0": "scale_x0 is for VideoCrafter2",
    "--teacher {at}/ms --width 64 --height 32 --beta_img 0 --beta_vid 0": "square", "--data {at}/none": "does not exist", "--data {at}/odd.pt": "is not of a known kind",
    "--data {at}/empty": "empty", "--data {at}/lonely": "gone.mp4", "--data {at}/blank.txt": "holds no prompt", "--data {at}/both": "both tars and videos",
    "--warmup 200": "warmup is 200 but the run has 200 steps", "--warmup -1": "warmup is -1", "--lora_dropout 1": "give a probability", "--lora_dropout .1 --rank 0": "rank 0 trains without LoRA",
    "--lora_dropout .1 --compile 1": "cannot be compiled", "--teacher_lora {at}/none.safetensors": "no LoRA file", "--teacher_lora {at}/odd.pt": "formats other than safetensors",
    "--teacher_lora {at}/style.safetensors=x": "FILE=strength", "--teacher_lora {at}/wrong.safetensors": "is not a LoRA for 'tiny'", "--teacher_lora {at}/empty": "holds 0 files of LoRA",
    "--out {at}/run --data {at}/clips --teacher_lora {at}/style.safetensors": "was made with another teacher",
    "--data {at}/prompts.txt --scale_x0 1": "scale_x0 is for latents of real clips", "--data {at}/prompts.txt --samples -1": "samples is -1",
    "--data {at}/prompts.txt --teacher_steps 0": "teacher_steps is 0", "--data {at}/prompts.txt --teacher_steps 1001": "steps is 1001: give 1 to 1000",
    "--data {at}/prompts.txt --batch 3 --accumulate 2": "in 2 pieces", "--data {at}/prompts.txt --teacher {at}/ms": "has no image and no video reward",
    "--data {at}/prompts.txt --prompts {at}/latin1.txt": "is not UTF-8", "--data {at}/prompts.txt --teacher_lora {at}/wrong.safetensors": "is not a LoRA for 'tiny'",
    "--data {at}/prompts.txt --out {at}/odd.pt": "cannot write to the output folder", "--data {at}/prompts.txt --samples 2 --teacher_steps 3 --out {at}/made": "was built with steps 2, not 3",
    "--data {at}/prompts.txt --samples 1 --teacher_steps 2 --out {at}/made": "a cache can grow, not shrink",
    "--data {at}/prompts.txt --samples 2 --teacher_steps 2 --out {at}/made --teacher_lora {at}/style.safetensors": "was built with denoiser",
    "--data {at}/text": "is a cache of texts", "--data {at}/pairs": "k 20, not 50", "--data {at}/pairs --k 20 --teacher tiny-flow": "was built with", "--mix 2": "has no option mix",
    "--image_frames 9": "image_frames", "--window 9": "window", "--texts {at}/latents": "is a cache of latents", "--texts {at}/none": "none",
    "--texts {at}/few": "captions to look at", "--batch 3 --accumulate 2": "in 2 pieces", "--out {at}/odd.pt": "cannot write to the output folder",
    "--out {at}/odd.pt/x": "cannot write to the output folder", "--out {at}/cut": "is truncated", "--out {at}/later --data {at}/clips": "is of a later version",
    "--out {at}/earlier --data {at}/clips": "is of an earlier version", "--out {at}/run": "was made with another data", "--out {at}/run --data {at}/clips --lr 1": "was made with other settings",
    "--out {at}/run --data {at}/clips --texts {at}/few": "with another text cache", "--out {at}/run --data {at}/clips --teacher tiny-flow": "was made with another teacher",
}
# raised by a run only once it is under way, or by the disk: words of the dry run
LATER = {"--held_out tiny-image --reward tiny-image,tiny-video": "is in the loss", "--held_out hpsv2.1@{at}/none.pt": "none.pt",
         "--held_out videoprism-base": "cannot score a clip of 8", "--texts {at}/few --data {at}/clips": "is not in the text cache",
         "--out {at}/folder": "is a folder where a file is to be written"}
if not find_spec("bitsandbytes"): OF_THE_RUN["--optimizer adamw8bit"] = "adamw8bit needs bitsandbytes"
RAISED = {}                                                 # module: functions that made a `UserError`


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    "Which function makes each `UserError`, also of those that are caught and told again"
    def init(self, *args):
        code = sys._getframe(1).f_code
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE): RAISED.setdefault(path.relative_to(PACKAGE).with_suffix("").as_posix(), set()).add(code.co_name)
        Exception.__init__(self, *args)
    monkeypatch.setattr(UserError, "__init__", init)


def words(case, at):
    argv = shlex.split(case.format(at=at))
    quick = [w for n, v in (("--batch", "2"), ("--rank", "2"), ("--track", "")) if n not in argv for w in (n, v)]
    return ["distill", *argv, *quick, *([] if "--out" in argv else ["--out", str(at/"new")])]


def refusal(argv):
    "The one sentence of a call that must fail"
    with pytest.raises(UserError) as e: cli.run([str(a) for a in argv])
    return str(e.value)


@pytest.mark.parametrize("case", OF_THE_RUN)
def test_it_refuses_what_the_run_refuses(at, case):
    "In the same words, before anything is written"
    before = tree(at)
    told = refusal([*words(case, at), "--dry_run"])
    assert OF_THE_RUN[case] in told and "\n" not in told
    assert tree(at) == before
    assert refusal(words(case, at)) == told
    assert not (at/"new").exists()


@pytest.mark.parametrize("case", LATER)
def test_it_refuses_what_a_run_would_refuse_later(at, case):
    before = tree(at)
    told = refusal([*words(case, at), "--dry_run"])
    assert LATER[case] in told and "\n" not in told
    assert tree(at) == before


def test_a_folder_in_use(at):
    with claim(at/"busy"):
        before, argv = tree(at/"busy"), words("--out {at}/busy", at)
        told = refusal([*argv, "--dry_run"])
        assert "in use by another run" in told and refusal(argv) == told and [p[0] for p in tree(at/"busy")] == [p[0] for p in before]


def test_an_engine_that_is_not_supported(at, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    told = refusal([*words("", at), "--dry_run"])
    assert told.startswith("DEEPSPEED is not supported") and refusal(words("", at)) == told


def test_a_full_disk(at, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    told = refusal([*words("", at), "--dry_run"])
    assert "GB are needed (checkpoints" in told and "make room" in told
    assert "cache of samples 0.0 GB, cache of text 0.0 GB" in refusal([*words("--data {at}/prompts.txt", at), "--dry_run"])


def test_a_gpu_that_is_too_small(at, monkeypatch):
    "Its memory is compared with the plan; `meta` stands for the plan's own device"
    monkeypatch.setattr(dryrun, "room_of", lambda device: 2**30)
    told = refusal([*words("", at), "--dry_run"])
    assert "1.5 GB to spare, but the device has 1.0 GB: `t2v-turbo plan --teacher tiny` lists the flags that fit" in told


def test_a_gpu_too_small_for_full_fine_tuning(at, monkeypatch):
    monkeypatch.setattr(train, "room_of", lambda device: 2**20)
    told = refusal([*words("--rank 0", at), "--dry_run"])
    assert "full fine-tuning of 'tiny' keeps" in told and "give a LoRA rank such as --rank 32" in told


def test_full_fine_tuning_under_fsdp(at, monkeypatch):
    monkeypatch.setattr(engines.Plain, "sharded", True)
    told = refusal([*words("--rank 0", at), "--dry_run"])
    assert "which FSDP does not shard" in told and refusal(words("--rank 0", at)) == told


NOT_HERE = dict(
    watch={"keep_best"},                                    # a checkpoint that someone deleted while the run went on
    checkpoints={"claim_together"},                         # repeats the sentence of `claim` on other processes
    engines={"__init__"},                                   # FSDP2 with an 8-bit optimiser: the rehearsal makes the same engine
    optimizer=set() if not find_spec("bitsandbytes") else {"make_optimizer"},
    memory={"save_memory"}, distill={"__init__"},           # two calls in Python that no option makes
    full={"__init__"},                                      # a teacher that carries a student, in Python
    **{"data/build": {"_check_options", "check", "size", "_room"},      # settings that a run does not have; its disk is checked with the checkpoints'
       "data/sources": {"__next__"}, "rewards/names": {"reward_named"}})   # a broken source, and an option in Python


def test_every_function_of_the_path_that_refuses_was_seen_refusing():
    "Of the modules that only training uses; run the whole file for it"
    if len(RAISED) < 12: pytest.skip("needs the tests above")
    for module in "config distill running watch checkpoints memory optimizer engines train full data/build data/sources rewards/names".split():
        defs = [f for f in ast.walk(ast.parse((PACKAGE/f"{module}.py").read_text())) if isinstance(f, ast.FunctionDef)]
        raising = {f.name for f in defs for n in ast.walk(f) if isinstance(n, ast.Raise) and "UserError(" in ast.unparse(n)}
        assert not (unseen := raising - RAISED.get(module, set()) - NOT_HERE.get(module, set())), f"{module}: no case makes {unseen} refuse"


# ---- what it lets pass

def test_ready(at, capsys):
    "The command that it prints has the same settings, and runs"
    before, argv = tree(at), ["distill", "--out", str(at/"good"), "--steps", "1", *SMALL, "--data", str(at/"clips"), "--match_official"]
    assert main([*argv, "--dry_run"]) == 0 and tree(at) == before
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    command = shlex.split(last.removeprefix("ready: t2v-turbo "))
    assert last.startswith("ready: ") and cli.read(command)[1] == cli.read(argv)[1]
    assert "2 clips of" in out and "in small, loss" in out and "to fetch  nothing" in out
    assert main(command) == 0 and (at/"good/student").is_dir()


def test_caches(at, capsys):
    "Latents, answers and texts: captions are the cache's, the values random"
    for more in (["--data", at/"latents"], ["--data", at/"pairs", "--k", "20"]):
        argv = ["distill", "--out", at/"none", "--texts", at/"text", *SMALL, *more, "--dry_run"]
        assert main([str(a) for a in argv]) == 0
        assert "4 latents of" in (out := capsys.readouterr().out) or "4 pairs of" in out
    assert not (at/"none").exists()


def test_a_folder_of_another_class(at, capsys):
    "A small ModelScopeT2V trains in its place, with two looks, save_memory, an EMA and another precision"
    argv = ["distill", "--teacher", at/"ms", "--out", at/"none", "--data", at/"clips", "--frames", "8", "--batch", "8", "--accumulate", "4", "--ema", ".9", "--dtype",
            "bfloat16", "--save_memory", "all", "--beta_img", "0", "--beta_vid", "0", "--prompts", at/"prompts.txt", "--rank", "2", "--track", "", "--dry_run"]
    before = tree(at)
    assert main([str(a) for a in argv]) == 0 and tree(at) == before
    assert "clips 8x32x32" in (out := capsys.readouterr().out) and "--accumulate 4" in out.splitlines()[-1]


def test_prompts_alone_with_a_lora(at, tmp_path, capsys):
    "Nothing is made, the run then makes the caches that were promised, and the same cache is promised again if it is lost"
    argv = ["distill", "--out", str(tmp_path/"o"), *SMALL, "--data", str(at/"prompts.txt"), "--samples", "3", "--teacher_steps", "2", "--steps", "2", "--warmup", "1", "--repeats", "1",
            "--lr_schedule", "cosine", "--teacher_lora", f"{at/'style.safetensors'}=0.5"]
    assert main([*argv, "--dry_run"]) == 0 and not (tmp_path/"o").exists()
    out = capsys.readouterr().out
    assert "3 latents of" in out and "to be made (8x8x8), captioned 'a red fish moving left in the sea'" in out and "cache of samples" in out and "with " in out
    assert cli.read(shlex.split(out.splitlines()[-1].removeprefix("ready: t2v-turbo ")))[1] == cli.read(argv)[1]
    assert main(argv) == 0
    for lost in ((), ("latents", "texts")):
        for name in lost: shutil.rmtree(tmp_path/"o"/name)
        before = tree(tmp_path/"o")
        assert main([*argv, "--dry_run"]) == 0 and tree(tmp_path/"o") == before
        assert ("to be made" in capsys.readouterr().out) == bool(lost)
    assert "was made with another data" in refusal([*argv, "--samples", "2", "--dry_run"])     # of the checkpoint


@pytest.mark.parametrize("more", ["--rank 0 --ema .9", "--lora_dropout .1 --warmup 199", "--lr_schedule cosine --warmup 2 --steps 3"])
def test_schedules_dropout_and_full_fine_tuning(at, more, capsys):
    "In the two steps, too; memory is that of the run"
    assert main([*words(f"--data {at}/clips {more} --eval_every 0", at), "--dry_run"]) == 0 and not (at/"new").exists()
    out = capsys.readouterr().out
    assert "in small, loss" in out and "not finite" not in out and more.split(" --")[0] in out.splitlines()[-1].replace("0.", ".")


AWAY = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("wan2.2-5b", "blocks.0.attn1.to_q", 3072), "Efficient-Large-Model/SANA-Video_2B_480p_diffusers": (
    "SanaVideoTransformer3DModel", "transformer_blocks.0.attn1.to_q", 2240)}


@pytest.mark.parametrize("teacher", AWAY)
def test_new_teachers_that_are_not_here(at, teacher, tmp_path, monkeypatch, capsys):
    "Their sizes count, a LoRA is compared with their layers, and their classes take the two steps"
    (kind, layer, width), made = AWAY[teacher], []
    monkeypatch.setattr(dryrun, "small_teacher", lambda kind, folder, make=dryrun.small_teacher: made.append(kind) or make(kind, folder))
    save_file({f"transformer.{layer}.lora_A.weight": torch.ones(1, width), f"transformer.{layer}.lora_B.weight": torch.ones(width, 1)}, tmp_path/"style.safetensors")
    argv = words(f"--teacher {teacher} --beta_img 0 --beta_vid 0 --height 64 --width 64 --frames 9 --data {at}/prompts.txt --samples 2 --dtype bfloat16 --eval_every 0", at)
    assert main([*argv, "--teacher_lora", str(tmp_path/"style.safetensors"), "--dry_run"]) == 0 and made == [kind] and not (at/"new").exists()
    out = capsys.readouterr().out
    assert f"to fetch  {teacher} (at most {dryrun.gb_of(teacher):g} GB)\n" in out and "clips 9x64x64" in out and "in small, loss" in out
    assert f"is not a LoRA for {teacher!r}" in refusal([*argv, "--teacher_lora", str(at/"wrong.safetensors"), "--dry_run"])
    assert "multiples of 32" in refusal([*argv, "--height", "48", "--dry_run"])


def test_a_lora_that_is_not_here(at, capsys):
    assert main([*words(f"--data {at}/clips --eval_every 0 --teacher_lora owner/model/style.safetensors,{at}/style.safetensors", at), "--dry_run"]) == 0
    assert "to fetch  owner/model/style.safetensors\n" in capsys.readouterr().out
    assert "is not a LoRA" in refusal([*words(f"--teacher_lora owner/model/style.safetensors,{at}/wrong.safetensors", at), "--dry_run"])


def test_one_table_of_sizes():
    from t2v_turbo.names import STUDENTS, TEACHERS
    for s in (*TEACHERS.values(), *STUDENTS.values()):
        if s.at: assert dryrun.gb_of(s.at) == s.gb


def test_tars_get_no_index(at, capsys):
    write_shards(at/"clips", at/"tars")
    before = tree(at)
    assert main(["distill", "--out", str(at/"none"), "--data", str(at/"tars"), *SMALL, "--dry_run"]) == 0
    assert tree(at) == before and "2 clips of" in capsys.readouterr().out


def test_the_hub_is_not_asked(at, tmp_path):
    "From an empty cache: the published sizes stand for teacher and rewards, and what would be fetched is listed"
    argv = ["distill", "--teacher", "ali-vilab/text-to-video-ms-1.7b", "--reward", "hpsv2.1,viclip-l14", "--out", str(at/"none"), "--data", str(at/"clips"), "--frames",
            "8", "--height", "64", "--width", "64", "--batch", "1", "--eval_every", "0", "--dry_run"]
    with hub.serve(tmp_path) as h:
        run = subprocess.run([sys.executable, "-m", "t2v_turbo.cli", *argv], env=hub.environment(h, tmp_path/"home"), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert h.log == [] and not list((tmp_path/"home").rglob("*.*")) and not (at/"none").exists()
    assert "ali-vilab/text-to-video-ms-1.7b (at most 7.35 GB), xswu/HPSv2 (at most 2 GB), OpenGVLab/ViCLIP (at most 1.7 GB)" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("ready: t2v-turbo distill --out") and "denoiser 5.3" in run.stdout


@pytest.mark.parametrize("more, told", {"--variant fp8": "no weights of variant 'fp8'", "--scale_x0 1": "scale_x0 is for VideoCrafter2", "--height 60": "multiples of 8",
                                        "--image_frames 99": "image_frames"}.items())
def test_a_teacher_that_is_not_here_is_checked_by_its_sizes(at, more, told):
    argv = words(f"--teacher ali-vilab/text-to-video-ms-1.7b --reward hpsv2.1,viclip-l14 {more}", at)
    assert told in refusal([*argv, "--dry_run"])


def test_a_vocabulary_that_nothing_brings(at, monkeypatch):
    monkeypatch.delenv("T2V_TURBO_CLIP_VOCABULARY", raising=False)
    argv = words(f"--teacher Wan-AI/Wan2.1-T2V-1.3B-Diffusers --reward viclip-l14 --beta_img 0 --height 32 --width 32 --frames 9 --data {at}/clips", at)
    assert "CLIP's vocabulary was not found: give with --vocabulary" in refusal([*argv, "--dry_run"])
    assert "not in the cache" in refusal([*words("--teacher some/model", at), "--dry_run"])


def test_ablate(at, capsys):
    argv = ["ablate", "--out", str(at/"grid"), "--over", "beta_img=0,1", "--seeds", "0,1", "--batch", "1", "--rank", "2", "--steps", "1"]
    before = tree(at)
    assert main([*argv, "--dry_run"]) == 0 and tree(at) == before
    out = capsys.readouterr().out
    command = shlex.split(out.splitlines()[-1].removeprefix("ready: t2v-turbo "))
    assert "4 cells to train, 2 without seeds" in out and cli.read(command)[1] == cli.read(argv)[1]
    assert "cell {'frames': 16}: frames 16 is not possible" in refusal([*argv, "--over", "frames=8,16", "--dry_run"])
    assert refusal([*argv, "--sample_steps", "17", "--dry_run"]) == refusal([*argv, "--sample_steps", "17"])
    assert tree(at) == before
