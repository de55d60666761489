"""How the threads of OpenMP wait, settled before torch loads them.

torch's operators run on OpenMP's threads. By default these spin for milliseconds after each operator, waiting for the
next one. Where another process has a core, the spinning threads take the rest of it from the threads that have work,
and everything is several times slower; with `OMP_WAIT_POLICY=PASSIVE` they sleep. OpenMP reads the environment once,
when it is loaded, so `import rwkv_lab` sets the variable before it imports torch. A policy that the environment names
already stays as it is. Processes that are started from here on inherit the variable.
"""

import logging
import os
import sys
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
# Each of them says how threads wait: of the standard, of GNU's OpenMP (torch on Linux), of LLVM's and Intel's (macOS).
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

_in_force = ""  # the policy that OpenMP read in this process


def set_wait_policy(environment: MutableMapping[str, str]) -> bool:
    """Add the passive policy to an environment in which no variable names one; whether it was added."""
    if wait_policy(environment):
        return False
    environment.update(PASSIVE)
    return True


def wait_policy(environment: MutableMapping[str, str]) -> str:
    """What an environment says of how threads wait, such as "OMP_WAIT_POLICY=PASSIVE"; "" where it says nothing."""
    return " ".join(f"{name}={environment[name]}" for name in VARIABLES if environment.get(name))


def policy_in_force() -> str:
    """What OpenMP was told in this process, as `wait_policy`; "" where it waits as it does by default."""
    return _in_force


def settle() -> None:
    """Set the policy of this process, or warn that torch was there before; `import rwkv_lab` calls it."""
    global _in_force
    if "torch" not in sys.modules:
        set_wait_policy(os.environ)
    _in_force = wait_policy(os.environ)
    if not _in_force and _threads_spin():
        log.warning(
            "torch was imported before rwkv_lab, so its threads spin while they wait and are several times slower "
            "beside other busy processes.\nImport rwkv_lab first, or set OMP_WAIT_POLICY=PASSIVE."
        )


def _threads_spin() -> bool:
    import torch

    return torch.backends.openmp.is_available() and torch.get_num_threads() > 1
