# SPDX-License-Identifier: BSD-3-Clause
"""Shared by the stage examples: sample frames, and a worker that runs the stage.

Each example implements the same stage. It swaps the Ethernet addresses, drops frames that are not
IPv4, sends frames from odd TCP and UDP ports to the second target, and counts all frames in its
context.
"""

import time

import rtap


def frames() -> list[bytes]:
    """IPv4 with several ports, IPv6, ARP, and one frame that is too short for a header."""
    ether = bytes.fromhex("02000000000a02000000000b")
    out = [
        ether + b"\x08\x00\x45" + bytes(19) + port.to_bytes(2, "big") + bytes(20)
        for port in range(1000, 1010)
    ]
    return [*out, ether + b"\x86\xdd" + bytes(60), ether + b"\x08\x06" + bytes(28), ether]


def show(stage: rtap.stages.Stage) -> None:
    """Run the stage on the sample frames; print each frame's target and first bytes."""
    pool = rtap.Mempool(64)
    burst = pool.alloc_burst(len(frames()), data=frames())
    for target, mbuf in zip(stage(burst, targets=2), burst, strict=True):
        print(target, bytes(mbuf)[:36].hex())


def run(stage: rtap.stages.Stage, seconds: float = 0.1) -> None:
    """Run the stage in a worker over net_null devices, which need no privileges."""
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
