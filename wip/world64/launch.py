"""Start a script detached on core 1: `python launch.py LOG script.py --its options`"""
import os
import subprocess
import sys

log, *command = sys.argv[1:]
env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
with open(log, "a") as out:
    child = subprocess.Popen(["taskset", "-c", "1", sys.executable, *command], stdout=out,
                             stderr=out, stdin=subprocess.DEVNULL, start_new_session=True, env=env)
print(child.pid)
