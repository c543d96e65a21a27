# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint32_t

from rtap._core.linux cimport iovec, msghdr
from rtap._core.pool cimport mbuf_t


cdef enum:
    PACKET_HEADROOM = 64        # in front of a frame: control data, a tag, a virtio-net header
    PACKET_DATA_ROOM = 64       # both addresses of a frame are in one place


cdef uint32_t packet_msg(msghdr *msg, iovec *iov, uint32_t n) noexcept nogil
cdef uint8_t *packet_put_tag(mbuf_t *m, uint8_t *hdr) noexcept nogil
cdef bint packet_gone(int fd) noexcept nogil
