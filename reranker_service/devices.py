"""GPUs that this process may use, and the number of them that one server needs."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, MutableMapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Variable that lists the GPUs that CUDA shows to a process: numbers or UUIDs, separated by commas."""
_NVML = "libnvidia-ml.so.1"
_CUDA_DEVICE = re.compile(r"cuda(?::(\d+))?")


class DeviceError(ValueError):
    """A flag asks for a GPU that is not there; the message names the flag."""


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that a process with these variables sees, each as ``CUDA_VISIBLE_DEVICES`` takes it.

    CUDA ignores everything behind the first entry that is no GPU; so does this function, for numbers.
    """
    count = _gpus_of_machine()
    listed = environment.get(VISIBLE)
    if not count or listed is None:
        return [str(number) for number in range(count)]
    names: list[str] = []
    for name in (one.strip() for one in listed.split(",")):
        number = int(name) if re.fullmatch(r"-?\d+", name) else 0
        if not name or not 0 <= number < count:
            break
        names.append(name)
    return names


def gpus_of_one_server(engine_args: Mapping[str, object]) -> int:
    """Return the number of GPUs that vLLM shares one model out to with these arguments.

    Raises:
        DeviceError: A size is no positive integer.
    """
    gpus = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = engine_args.get(name, 1)
        if type(size) is not int or size < 1:
            raise DeviceError(f"--engine-args: {name} is {size!r}; give an integer, 1 or more")
        gpus *= size
    return gpus


def check_parallel(engine_args: Mapping[str, object], gpus: Sequence[str]) -> None:
    """Refuse a model that is shared out to more GPUs than there are. Without any GPU, vLLM's CPU build decides.

    Raises:
        DeviceError: There are too few GPUs.
    """
    needed = gpus_of_one_server(engine_args)
    if gpus and needed > len(gpus):
        raise DeviceError(
            f"--engine-args: tensor_parallel_size x pipeline_parallel_size is {needed}, and {_visible(gpus)}"
        )


def pin(device: str, engine_args: Mapping[str, object], environment: MutableMapping[str, str]) -> None:
    """Show CUDA only the GPU that ``--device`` names; takes effect if CUDA has not started in this process.

    Args:
        device: ``"auto"``, ``"cuda"``, or ``"cuda:N"`` for the Nth of the visible GPUs.
        engine_args: Arguments for vLLM.
        environment: The variables of this process, which its children inherit; changed in place.

    Raises:
        DeviceError: There is no such GPU, or one GPU does not suffice.
    """
    gpus = visible_gpus(environment)
    check_parallel(engine_args, gpus)
    if device == "auto":
        return
    found = _CUDA_DEVICE.fullmatch(device)
    if found is None:
        raise DeviceError(
            f"--device {device} is for the torch engine; vLLM takes auto, cuda and cuda:N. Leave the flag out, or use "
            "--engine torch"
        )
    number = int(found[1] or 0)
    if number >= len(gpus):
        raise DeviceError(f"--device {device}: {_visible(gpus)}; GPUs are counted from 0")
    if found[1] is None:
        return
    if (needed := gpus_of_one_server(engine_args)) > 1:
        raise DeviceError(
            f"--device {device} is one GPU, and --engine-args asks for {needed}; leave --device out and list the GPUs "
            f"in {VISIBLE}"
        )
    environment[VISIBLE] = gpus[number]


def _visible(gpus: Sequence[str]) -> str:
    if not gpus:
        return f"no GPU is visible (see nvidia-smi and {VISIBLE})"
    return f"{len(gpus)} {'GPU is' if len(gpus) == 1 else 'GPUs are'} visible ({VISIBLE})"


def _gpus_of_machine() -> int:
    """Count the GPUs by NVML, which starts no CUDA context; 0 without a driver."""
    try:
        nvml = ctypes.CDLL(_NVML)
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        return count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
    finally:
        nvml.nvmlShutdown()
