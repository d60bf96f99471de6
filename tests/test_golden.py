"Parity with numbers recorded from the published implementations; sizes are read from the files"
from inspect import signature

import golden_core
import golden_rewards
import golden_teachers
import pytest
from golden_files import FILES, FOLDER

PARTS = golden_core.PARTS | golden_teachers.PARTS | golden_rewards.PARTS


def lora_lists():
    "A `.pt` list belongs to the file of the same name"
    return {p.name for p in FILES if p.suffix == ".pt" and prefix(p)}


def prefix(path): return next((k for k in PARTS if path.name.startswith(k + "_")), None)


CASES = [pytest.param(check, id=f"{p.name}:{name}") for p in FILES
         if prefix(p) and p.suffix == ".safetensors" for name, check in PARTS[prefix(p)](p)]
NOT_COVERED = [p.name for p in FILES if not prefix(p)]


@pytest.mark.skipif(not FILES, reason=f"no recorded numbers in {FOLDER}; set T2V_TURBO_GOLDEN")
def test_folder_is_read():
    "Every file with a known prefix gives at least one test, its LoRA list with it"
    names = {c.id.split(":")[0] for c in CASES}
    assert names | lora_lists() == {p.name for p in FILES if prefix(p)}


@pytest.mark.parametrize("check", CASES)
def test_parity(check, request):
    "Our numbers are the recorded ones"
    assert check is not None, "this group of keys has no check"
    check(**{k: request.getfixturevalue(k) for k in signature(check).parameters
             if k in ("clip_vocabulary", "tmp_path")})


@pytest.mark.parametrize("name", NOT_COVERED)
def test_not_yet_covered(name):
    "Files of parts that are not written yet are named, not hidden"
    pytest.skip(f"not yet covered: {name}")
