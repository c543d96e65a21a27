# SPDX-License-Identifier: BSD-3-Clause
"""Coalescing called without Python objects, and a memcpy of the same payload to compare."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from rtap._frames.coalesce cimport gro_burst
from rtap._frames.gro cimport (
    GRO_TRUST, gro_add, gro_create, gro_destroy, gro_drained, gro_flush, gro_t, gro_write,
)
from rtap._core.pool cimport mbuf_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec *iov, int n)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *p, size_t n)

cdef enum:
    HEAD = 64
    HEADROOM = 128
    HDR = 10


cdef class Train:
    """Frames of one flow in slots of their own."""

    cdef uint32_t n
    cdef uint32_t stride
    cdef mbuf_t *m
    cdef mbuf_t **v
    cdef mbuf_t **out
    cdef uint8_t *arena
    cdef uint8_t *flat          # the same bytes in one piece
    cdef uint8_t *slot          # 64 KiB to copy into
    cdef uint8_t heads[HEAD]    # the first frame's headers as they were
    cdef uint32_t *lengths
    cdef uint32_t total
    cdef gro_t *g
    cdef uint64_t good

    def __cinit__(self, list frames, bint udp=False):
        cdef uint32_t i
        cdef bytes frame
        self.n = <uint32_t>len(frames)
        self.stride = 2048 + HEADROOM
        self.m = <mbuf_t *>calloc(self.n, sizeof(mbuf_t))
        self.v = <mbuf_t **>calloc(self.n, sizeof(mbuf_t *))
        self.out = <mbuf_t **>calloc(2 * self.n, sizeof(mbuf_t *))
        self.lengths = <uint32_t *>calloc(self.n, sizeof(uint32_t))
        self.arena = <uint8_t *>calloc(self.n, self.stride)
        self.flat = <uint8_t *>calloc(1, 1 << 17)
        self.slot = <uint8_t *>calloc(1, 1 << 17)
        self.g = gro_create(64, 1024, 1 if udp else 0, 65535)
        for i in range(self.n):
            frame = frames[i]
            self.lengths[i] = <uint32_t>len(frame)
            memcpy(self.arena + i * self.stride + HEADROOM, <const char *>frame, len(frame))
            memcpy(self.flat + self.total, <const char *>frame, len(frame))
            self.total += self.lengths[i]
            self.m[i].buf = self.arena + i * self.stride
            self.m[i].buf_len = self.stride
            self.v[i] = &self.m[i]
        memcpy(self.heads, self.arena + HEADROOM, HEAD)

    def __dealloc__(self):
        free(self.m)
        free(self.v)
        free(self.out)
        free(self.lengths)
        free(self.arena)
        free(self.flat)
        free(self.slot)
        gro_destroy(self.g)

    cdef void restore(self) noexcept nogil:
        cdef uint32_t i
        cdef mbuf_t *m
        memcpy(self.arena + HEADROOM, self.heads, HEAD)
        for i in range(self.n):
            m = &self.m[i]
            m.next = NULL
            m.refcnt = 1
            m.ol_flags = self.good
            m.data_off = HEADROOM
            m.data_len = m.pkt_len = self.lengths[i]
            m.nb_segs = 1
            m.vnet_flags = 0

    cdef uint32_t chained(self) noexcept nogil:
        cdef uint64_t timed_out = 0
        self.restore()
        return gro_burst(self.g, self.v, self.n, 0, 0, &timed_out, self.out)

    cdef uint32_t copied(self) noexcept nogil:
        """The same, with the payload copied into one slot."""
        cdef uint32_t i, got
        cdef gro_t *g = self.g
        self.restore()
        for i in range(self.n):
            gro_add(g, self.v[i], 0)
        gro_flush(g, <uint64_t>-1)
        got = g.n_done
        for i in range(got):
            gro_write(g, &g.done[i], self.slot + HDR)
        gro_drained(g)
        return got

    def trust(self, bint on):
        self.g.flags = GRO_TRUST if on else 0
        self.good = (1 << 8) if on else 0

    def rounds(self, str how, uint32_t count):
        """Coalesces (how: chain or copy) or copies the frames `count` times; returns the groups."""
        cdef uint32_t _i, got = 0
        if how == "chain":
            with nogil:
                for _i in range(count):
                    got = self.chained()
        elif how == "copy":
            with nogil:
                for _i in range(count):
                    got = self.copied()
        elif how == "restore":
            with nogil:
                for _i in range(count):
                    self.restore()
        else:
            with nogil:
                for _i in range(count):
                    memcpy(self.slot, self.flat, self.total)
                    got += self.slot[_i % self.total]
        return got

    def send(self, int fd, str how, uint32_t count):
        """Coalesces and writes to a TAP device with virtio-net headers, or writes each frame."""
        cdef iovec iov[600]
        cdef uint8_t hdr[HDR]
        cdef uint32_t _i, j, k
        cdef mbuf_t *m
        cdef bint chain = how == "chain", copy = how == "copy"
        memset(hdr, 0, HDR)
        with nogil:
            for _i in range(count):
                if chain:
                    self.chained()
                    m = self.out[0]
                    hdr[0] = 1
                    hdr[1] = m.gso_type
                    hdr[2] = <uint8_t>(m.csum_at - m.data_off + m.l4_len)
                    hdr[4] = <uint8_t>(m.tso_segsz & 0xff)
                    hdr[5] = <uint8_t>(m.tso_segsz >> 8)
                    hdr[6] = <uint8_t>(m.csum_at - m.data_off)
                    hdr[8] = <uint8_t>m.csum_offset
                    iov[0].iov_base = hdr
                    iov[0].iov_len = HDR
                    k = 1
                    while m != NULL:
                        iov[k].iov_base = m.buf + m.data_off
                        iov[k].iov_len = m.data_len
                        k += 1
                        m = m.next
                    if writev(fd, iov, k) < 0:
                        with gil:
                            raise OSError("writev")
                elif copy:
                    self.copied()
                    memset(self.slot, 0, HDR)
                    self.slot[0] = 1
                    self.slot[1] = 1
                    self.slot[2] = 54
                    self.slot[4] = <uint8_t>((self.lengths[0] - 54) & 0xff)
                    self.slot[5] = <uint8_t>((self.lengths[0] - 54) >> 8)
                    self.slot[6] = 34
                    self.slot[8] = 16
                    if write(fd, self.slot, HDR + 54 + (self.total - 54 * self.n)) < 0:
                        with gil:
                            raise OSError("write")
                else:
                    for j in range(self.n):
                        iov[0].iov_base = hdr
                        iov[0].iov_len = HDR
                        iov[1].iov_base = self.arena + j * self.stride + HEADROOM
                        iov[1].iov_len = self.lengths[j]
                        if writev(fd, iov, 2) < 0:
                            with gil:
                                raise OSError("writev")
