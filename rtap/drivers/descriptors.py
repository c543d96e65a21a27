# SPDX-License-Identifier: BSD-3-Clause
"""The queue descriptors of one TAP or TUN interface: opened, closed, reopened, brought back."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import warnings
from functools import partial

from rtap._core.descriptor import Descriptor
from rtap._ring import purge
from rtap.control import tun
from rtap.control.attach import DYING_S, POLL_S, adopt, attach_first, claimed
from rtap.control.channel import NetNSKey, hold
from rtap.control.netlink import MOVES, Control, LinkState, find_link
from rtap.control.netns import NetNS, call_in
from rtap.control.tun import QueueFile, QueueFlag, TunFeature
from rtap.drivers.options import IfaceOptions
from rtap.errors import DeviceGone

__all__ = ["Descriptors"]

#: The descriptors of devices with queues. When the collector finds a device in a cycle, it
#: finalises the device's objects in any order, and would close descriptors that queues still use.
_held: set[Descriptors] = set()


class Descriptors:
    """Descriptor q of `fds` belongs to queue q; the first is also the interface's handle.

    `control` talks to the interface through rtnetlink. `ns` is where the interface is made; from
    here on it belongs to this object.
    """

    def __init__(
        self, ns: NetNS, ifname: str, mode: str, *, vnet_hdr: bool, options: IfaceOptions
    ) -> None:
        self.mode = mode
        self.options = options
        self.sndbuf = options.sndbuf
        #: Whether the first one came from another program: it cannot be opened anew.
        self.adopted = options.fd is not None
        self._files: list[QueueFile] = []
        self._persists = False
        # Somebody else made it, and made it persist: do not change its settings.
        self._taken_over = False
        # It is kept alive without descriptors for a moment, see negotiate_header.
        self._kept_alive = False
        self._detached: set[int] = set()
        #: Frames that waited on descriptors that were closed for another configuration.
        self.purged = 0
        channel = control = None
        try:
            channel = hold(ns.fd)  # one socket for all of this
            if options.fd is None:
                self._files.append(call_in(ns.fd, tun.open_control))
                attached = attach_first(
                    ns, self._files[0], ifname, mode, vnet_hdr=vnet_hdr, multi_queue=None
                )
                iface, self._taken_over = attached.iface, attached.taken_over
            else:
                file, iface = adopt(ns, options.fd, mode)
                self._files.append(file)
            fd = self.first
            self.name = iface.name
            self.flags = iface.flags
            if self.sndbuf is None:
                self.sndbuf = tun.get_sndbuf(fd, self.name)
            self._prepare(fd)
            link = find_link(ns.fd, iface.name)
            if link is None:
                raise DeviceGone(errno.ENODEV, f"{iface.name} vanished", iface.name)
            self._persists = link.persist
            control = Control(ns, link.index, iface.name, self.relocate, self.strayed)
            self.control = control
            self._apply_options()
        except BaseException:
            self.close(0)
            if control is not None:
                control.close()
            ns.close()
            raise
        finally:
            if channel is not None:
                channel.release()

    @property
    def fds(self) -> list[int]:
        return [file.fileno() for file in self._files]

    @property
    def first(self) -> int:
        """The first queue's descriptor, through which the interface is controlled."""
        if not self._files:
            raise DeviceGone(errno.EBADF, f"{self.name} was lost while reopening it", self.name)
        return self._files[0].fileno()

    @property
    def vnet_hdr(self) -> bool:
        return bool(self.flags & QueueFlag.VNET_HDR)

    @property
    def multi_queue(self) -> bool:
        return bool(self.flags & QueueFlag.MULTI_QUEUE)

    @property
    def persist(self) -> bool:
        return bool(tun.get_iface(self.first, self.name).flags & QueueFlag.PERSIST)

    def set_persist(self, on: bool) -> None:
        """Whether the interface outlives its descriptors."""
        tun.set_persist(self.first, on, self.name)
        self._persists = on

    def present_name(self) -> str:
        """The interface's name now; remembers it. DeviceGone when it was deleted."""
        self.name = tun.get_iface(self.first, self.name).name
        return self.name

    def _lost(self, fd: int) -> bool:
        try:
            tun.get_iface(fd, self.name)
        except DeviceGone:
            return True
        return False

    @property
    def lost(self) -> bool:
        """Whether the interface behind one of the descriptors is gone."""
        return any(map(self._lost, self.fds))

    def _netns_now(self) -> Descriptor | None:
        """Where the interface is; None when it is gone or we may not ask."""
        if not self._files:
            return None
        try:
            return tun.device_netns(self.first, self.name)
        except (DeviceGone, PermissionError):
            return None
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # Linux before 5.2
                raise
            return None

    def strayed(self, key: NetNSKey | None) -> bool:
        """Whether the interface has left the namespace of that key."""
        there = self._netns_now()
        if there is None:
            return False
        with there:
            now = os.fstat(there.fileno())
        return (now.st_dev, now.st_ino) != key

    def relocate(self) -> tuple[NetNS, int] | None:
        """Where the interface is now, by its descriptor; None when it is gone."""
        for _ in range(MOVES):
            there = self._netns_now()
            if there is None:
                break
            with there:
                ns = NetNS.from_fd(there.fileno())
            try:
                link = find_link(ns.fd, self.present_name())
            except OSError:
                link = None
            if link is not None:
                return ns, link.index
            ns.close()  # it was moved or renamed since the query
        return None

    # -- the number of descriptors

    def _prepare(self, fd: int) -> None:
        if self.sndbuf is not None:
            tun.set_sndbuf(fd, self.sndbuf, self.name)

    def _apply_options(self) -> None:
        options = self.options
        if options.txqueuelen is not None:
            self.control.set_txqueuelen(options.txqueuelen)
        # Last: after this step the interface may belong to somebody else.
        for number, set_to in ((options.owner, tun.set_owner), (options.group, tun.set_group)):
            if isinstance(number, int):
                set_to(self.first, number, self.name)

    def close(self, keep: int = 0) -> None:
        """Close all but the first `keep`."""
        # From the end: if an earlier one were closed, the kernel would move its last queue to that
        # place.
        while len(self._files) > keep:
            self._files.pop().close()
        if not self._files:
            _held.discard(self)

    def hold(self) -> None:
        """Keep them open until :meth:`close`, for queues, even if this object is forgotten."""
        _held.add(self)

    def _give_up(self, keep: int = 0) -> None:
        """As :meth:`close`, but count the waiting frames: the kernel throws them away uncounted."""
        for file in reversed(self._files[keep:]):
            self.purged += purge(file.fileno())
            self._files.pop().close()

    def resize(self, n: int) -> None:
        """Have `n` of them, all attached."""
        for q in sorted(self._detached):
            self.attach(q, True)
        self._give_up(n)
        if len(self._files) < n:
            self._open(n)

    def _open(self, n: int) -> None:
        link = self.control.get()
        before = len(self._files)
        attach = partial(
            tun.open_file,
            link.name,
            self.mode,
            multi_queue=self.multi_queue,
            vnet_hdr=self.vnet_hdr,
        )
        try:
            while len(self._files) < n:
                file, _ = call_in(self.control.netns.fd, attach)
                self._files.append(file)
                self._prepare(file.fileno())
            queues = self.control.get().queues
            if queues is not None and queues < n:
                # It was renamed or moved meanwhile: these descriptors belong to a new interface of
                # that name.
                raise DeviceGone(errno.ENODEV, f"{link.name} was renamed or moved", link.name)
        except BaseException:
            self._give_up(before)
            raise

    def attach(self, queue_id: int, attached: bool) -> None:
        """Let the kernel send frames to a queue, or stop it from doing so.

        The only queue of a plain interface cannot be detached: frames for it
        wait, and are missed when there is no more room.
        """
        if attached == (queue_id not in self._detached):
            return
        if self.multi_queue:
            try:
                tun.set_queue_attached(self.fds[queue_id], attached, self.name)
            except OSError:
                tun.get_iface(self.fds[queue_id], self.name)  # raises if that is the reason
                raise
        if attached:
            self._detached.discard(queue_id)
        else:
            self._detached.add(queue_id)

    def is_shared(self) -> bool:
        """Whether others had queues on the interface before us."""
        if not self.adopted:
            return False
        queues = self.control.get().queues
        return queues is not None and queues > len(self._files)

    def is_attached(self, queue_id: int) -> bool:
        return queue_id not in self._detached

    # -- anew

    def negotiate_header(self, wanted: bool) -> None:
        """Switch virtio-net headers on or off: they cost a tenth of a small frame.

        The kernel decides that when an interface's first queue attaches. So the queues are closed
        and the first one is opened anew; the interface is kept alive for that moment.
        """
        if self.adopted or wanted == self.vnet_hdr:
            return
        link = self.control.get()
        attach = partial(
            tun.open_file, link.name, self.mode, multi_queue=self.multi_queue, vnet_hdr=wanted
        )
        tun.set_offload(self.first, TunFeature(0), self.name)
        # Without queues it looks free, and others could take it over.
        with claimed(self.control.netns.fd, link.index, time.monotonic() + DYING_S):
            self._kept_alive = not self.persist
            try:
                tun.set_persist(self.first, True, self.name)
                self._give_up()
                file, iface = call_in(self.control.netns.fd, attach)
                self._files.append(file)
                self.flags = iface.flags
                self._prepare(file.fileno())
                if not link.carrier:  # attaching had raised it
                    tun.set_carrier(file.fileno(), False, link.name)
            finally:
                self.let_die()
        if wanted and not self.vnet_hdr:
            raise OSError(
                errno.EBUSY, f"offloads need {link.name} alone, but others have queues of it"
            )

    def let_die(self) -> None:
        """Let the interface die with its queues again, after :meth:`negotiate_header`."""
        if not self._kept_alive:
            return
        if self._files:
            tun.set_persist(self.first, False, self.name)
        else:
            with contextlib.suppress(OSError):
                self.control.delete()
        self._kept_alive = False

    def revive(self, last: LinkState) -> None:
        """Put the descriptors of a deleted interface on a new one with that name and settings.

        It is made in the namespace that the first descriptor was opened in, of the same kind. If
        somebody made a persistent one of that name and kind meanwhile, that is taken over, and
        stays persistent. Its carrier is off. The descriptors keep their numbers, so references to
        them stay valid. If this fails halfway, it can be tried again with the same `last`.
        """
        if self._lost(self.first):
            attached = attach_first(
                self.control.netns,
                self._files[0],
                last.name,
                self.mode,
                vnet_hdr=self.vnet_hdr,
                multi_queue=self.multi_queue,
            )
            self._taken_over = attached.taken_over
            self._persists |= attached.taken_over
            self.name = attached.iface.name
            if attached.iface.flags & QueueFlag.VNET_HDR != self.flags & QueueFlag.VNET_HDR:
                raise OSError(
                    errno.EEXIST, f"{self.name} was made anew by somebody else, of another kind"
                )
        tun.set_carrier(self.first, False, self.name)
        for fd in self.fds:
            if self._lost(fd):
                tun.join(
                    fd,
                    self.name,
                    self.mode,
                    multi_queue=self.multi_queue,
                    vnet_hdr=self.vnet_hdr,
                )
            self._prepare(fd)
        self._detached.clear()
        tun.set_persist(self.first, self._persists, self.name)
        if not self.control.follow():
            raise DeviceGone(errno.ENODEV, f"{self.name} vanished", self.name)
        self.control.set_mtu(last.mtu)
        if self.mode == "tap":
            self.control.set_mac(last.mac)
        if not self._taken_over:
            self.control.set_txqueuelen(last.txqueuelen)
            for key, set_to in (
                ("IFLA_TUN_OWNER", tun.set_owner),
                ("IFLA_TUN_GROUP", tun.set_group),
            ):
                if key in last.tun:
                    set_to(self.first, last.tun[key], self.name)
        self._apply_options()

    def await_gone(self) -> None:
        """Wait until the interface is gone, after its descriptors are closed; or warn."""
        deadline = time.monotonic() + DYING_S
        while not sys.is_finalizing():
            try:
                if self.control.peek() is None:
                    return
            except RuntimeError:
                return  # the interpreter is exiting and starts no thread any more
            if time.monotonic() > deadline:
                warnings.warn(
                    f"{self.name} outlives its device: another process holds a descriptor of it",
                    ResourceWarning,
                    stacklevel=2,
                )
                return
            time.sleep(POLL_S)
