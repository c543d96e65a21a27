# SPDX-License-Identifier: BSD-3-Clause
"""A layer-3 tunnel between two hosts: the IP packets of a TUN interface, in UDP datagrams.

On each host, as root: python vpn.py LOCAL:PORT REMOTE:PORT ADDRESS/LENGTH
ADDRESS is this host's in the tunnel. Nothing is encrypted; the kernel lets in datagrams from REMOTE
only. It ends with Ctrl-C or SIGTERM, and says what went through.
"""

import argparse
import signal

from pyroute2 import IPRoute

import rtap
from rtap.control.udp import parse

# Let the kernel hand over and take TCP and UDP in packets of up to 64 KiB.
RX = (
    rtap.RxOffload.TCP_CKSUM
    | rtap.RxOffload.UDP_CKSUM
    | rtap.RxOffload.TCP_LRO
    | rtap.RxOffload.UDP_LRO
)
TX = rtap.TxOffload.UDP_TSO


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("local", type=parse)
    parser.add_argument("remote", type=parse)
    parser.add_argument("address")
    parser.add_argument("--mtu", type=int, default=1420, help="of the tunnel (default 1420)")
    args = parser.parse_args()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with (
        rtap.open_udp(args.local, args.remote, pmtu="do") as udp,
        rtap.open(
            "vpn%d", mode="tun", mtu=args.mtu, rx_offloads=RX, tx_offloads=TX, tx_gro=True
        ) as tun,
        IPRoute() as ipr,
    ):
        address, length = args.address.split("/")
        ipr.addr("add", index=tun.info().if_index, address=address, prefixlen=int(length))
        worker = rtap.Worker()
        worker.forward((tun, 0), (udp, 0), on_full="retry")
        worker.forward((udp, 0), (tun, 0), on_full="retry")
        with worker:
            print(f"{tun.ifname}: {args.address}, {args.local} to {args.remote}", flush=True)
            signal.sigwait(signals)
        for route in worker.stats().routes:
            print(f"{route.source}: {route.rx_packets} packets, {route.rx_bytes} bytes")


if __name__ == "__main__":
    main()
