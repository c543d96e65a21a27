# SPDX-License-Identifier: BSD-3-Clause
"""What the examples of stages have in common: frames to try one on, and a worker to run it in.

The stage of each example exchanges the Ethernet addresses, drops what is not IPv4, sends frames
from odd TCP and UDP ports to the second target, and counts all frames in its context.
"""

import time

import rtap


def frames() -> list[bytes]:
    """IPv4 with several ports, IPv6, ARP, and one that is too short for a header."""
    ether = bytes.fromhex("02000000000a02000000000b")
    out = [
        ether + b"\x08\x00\x45" + bytes(19) + port.to_bytes(2, "big") + bytes(20)
        for port in range(1000, 1010)
    ]
    return [*out, ether + b"\x86\xdd" + bytes(60), ether + b"\x08\x06" + bytes(28), ether]


def show(stage: rtap.stages.Stage) -> None:
    """Print what the stage makes of those frames: each target, and the frame's first bytes."""
    pool = rtap.Mempool(64)
    burst = pool.alloc_burst(len(frames()), data=frames())
    for target, mbuf in zip(stage(burst, targets=2), burst, strict=True):
        print(target, bytes(mbuf)[:36].hex())


def run(stage: rtap.stages.Stage, seconds: float = 0.1) -> None:
    """Run it in a worker, on frames from nowhere and to nowhere (no privileges needed)."""
    with rtap.probe("net_null0,size=64") as device:
        device.configure(2, 2)
        pool = rtap.Mempool(1024)
        for queue in range(2):
            device.rx_queue_setup(queue, 64, pool)
            device.tx_queue_setup(queue, 64)
        device.start()
        worker = rtap.Worker()
        worker.forward((device, 0), [(device, 0), (device, 1)], stages=[stage])
        with worker:
            time.sleep(seconds)
        (route,) = worker.stats().routes
    if route.error or not route.stages[0].packets:
        raise RuntimeError(f"the stage did not run: {route}")
