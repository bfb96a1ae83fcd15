"""Whether the kernels can run, and the flags by which a device tells the host that it is done.

Triton comes with torch's builds for GPUs. Under `TRITON_INTERPRET=1`, set before Triton is first
imported, its interpreter runs the kernels on a CPU, slowly: that is how they are tested.
"""

import functools
import importlib.util

import torch

MOST_ITERATIONS = 15  # of Dykstra: two bits each of an int32
LAG = 1  # Newton steps that the device may be ahead of what the host knows


def can_call(cost_VU: torch.Tensor) -> bool:
    """Whether the kernels take such a cost: float32, on a GPU, or on a CPU in the interpreter."""
    if cost_VU.dtype != torch.float32 or not _has_triton():
        return False
    return cost_VU.is_cuda or (cost_VU.is_cpu and interpreting())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is on."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


class Flags:
    """Says whether a search still moves, without a wait of the device for the host.

    The flags of each step are copied to the host behind the step's kernels; the host reads those
    of LAG steps ago, while the device works on. So the last LAG steps find nothing to do, and end
    at once.

    Args:
        flags: integers on the device, not 0 where something moves; rewritten by every step.
    """

    def __init__(self, flags: torch.Tensor):
        self.flags, self.steps = flags, 0
        slots = torch.empty(LAG + 1, len(flags), dtype=flags.dtype, pin_memory=flags.is_cuda)
        self.slots, self.host = slots, slots.numpy()
        self.events = [torch.cuda.Event() for _ in slots] if flags.is_cuda else None

    def down(self) -> bool:
        """Note a step's flags; whether those of LAG steps ago are all 0."""
        slot = self.steps % len(self.slots)
        self.slots[slot].copy_(self.flags, non_blocking=True)
        if self.events:
            self.events[slot].record()
        self.steps += 1
        return self.steps > LAG and self._read((slot + 1) % len(self.slots))

    def _read(self, slot: int) -> bool:
        if self.events:
            self.events[slot].synchronize()
        return not self.host[slot].any()
