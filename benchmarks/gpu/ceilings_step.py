"""The ceilings that every later number is held against: of the memory, and of the multiplications in each precision."""

from __future__ import annotations

import dataclasses

from ceilings import at_rest, measure_ceilings
from gpu.items import Context, Items, Number

UNITS = {"read_bytes": "B/s"}  # all others are operations a second
KEYS = {"read_bytes": "memory", "bf16_flops": "bf16", "fp32_flops": "fp32"}
items = Items()


@items("ceilings")
def ceilings(context: Context) -> list[Number]:
    """Named as the fields of `Ceilings`."""
    measured = at_rest(lambda: measure_ceilings(context.device), tries=1)
    return [
        Number(name, value, UNITS.get(name, "FLOP/s"), key=KEYS.get(name, ""))
        for name, value in dataclasses.asdict(measured).items()
    ]


if __name__ == "__main__":
    items.main()
