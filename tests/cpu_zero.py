"""DeepSpeed on a CPU: without its C++ helper for processes of one machine, which takes minutes to build, and cutting up small tensors too.

    accelerate launch --config_file configs/zero3.yaml --num_processes 2 tests/cpu_zero.py distill ...
"""
import os
import sys
import warnings

warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)      # of DeepSpeed's own calls

import deepspeed  # noqa: E402
from accelerate.utils import DeepSpeedPlugin  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
plain = DeepSpeedPlugin.__post_init__


def cut_all(self):
    plain(self)
    if self.zero_stage == 3: self.deepspeed_config["zero_optimization"] |= dict(stage3_param_persistence_threshold=0)


DeepSpeedPlugin.__post_init__ = cut_all

if __name__ == "__main__":
    from t2v_turbo.cli import main
    code = main()
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)         # gloo's threads, which DeepSpeed leaves behind, may abort an orderly exit
