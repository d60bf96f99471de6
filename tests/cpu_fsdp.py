"""FSDP2 on a CPU: accelerate turns to FSDP only where it sees an accelerator, so here a CPU counts as one.

    accelerate launch --config_file configs/fsdp2.yaml --num_processes 2 tests/cpu_fsdp.py distill ...

Nothing else is changed: the plugin is the one that accelerate makes of the config file, and torch's `fully_shard` runs on gloo.
"""
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kw):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kw)
    if fsdp_plugin is None or self.distributed_type != DistributedType.MULTI_CPU: return
    self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
    if self._mixed_precision != "no": fsdp_plugin.set_mixed_precision(self._mixed_precision)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp

if __name__ == "__main__":
    from t2v_turbo.cli import main
    sys.exit(main())
