# SPDX-License-Identifier: BSD-3-Clause
"""The special treatment of packet sockets (``packet(7)``).

The kernel takes the outermost VLAN tag out of every frame that it receives.  It reports the tag
beside the frame, in control data (PACKET_AUXDATA), which only recvmsg(2) delivers.  So frames are
received with recvmsg, and the tag is put back in its place.  The control data lies in the frame's
own slot, in front of the virtio-net header.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uintptr_t
from libc.string cimport memmove, memset

from rtap._core.linux cimport (
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, iovec, msghdr,
)
from rtap._core.pool cimport mbuf_data, mbuf_t
from rtap._frames.vnet cimport VNET_HDR_LEN

cdef extern from "rtap_compat.h" nogil:
    const int SOL_PACKET
    const int PACKET_AUXDATA
    const uint32_t TP_STATUS_VLAN_VALID
    const uint32_t TP_STATUS_VLAN_TPID_VALID
    struct tpacket_auxdata:
        uint32_t tp_status
        uint16_t tp_vlan_tci
        uint16_t tp_vlan_tpid
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    struct sockaddr_ll:
        int sll_ifindex
    size_t CMSG_LEN(size_t n)
    size_t CMSG_SPACE(size_t n)
    unsigned char *CMSG_DATA(cmsghdr *c)
    int getsockname "rtap_getsockname" (int fd, void *address, unsigned int *n)

cdef enum:
    ADDRESSES = 12              # both addresses, in front of a tag
    TAG = 4
    VLAN_TPID = 0x8100          # for kernels that do not say


cdef inline cmsghdr *control_of(uint8_t *hdr) noexcept nogil:
    """Where the control data of a frame lies whose virtio-net header is at ``hdr``."""
    return <cmsghdr *>(<uintptr_t>(hdr - CMSG_SPACE(sizeof(tpacket_auxdata)))
                       & ~<uintptr_t>(sizeof(size_t) - 1))


cdef uint32_t packet_msg(msghdr *msg, iovec *iov, uint32_t n) noexcept nogil:
    """Describes a receive into ``n`` pieces, the first of which begins with the virtio-net header;
    returns ``n``."""
    cdef cmsghdr *control = control_of(<uint8_t *>iov[0].iov_base)
    control.cmsg_len = 0
    memset(msg, 0, sizeof(msghdr))
    msg.msg_iov = iov
    msg.msg_iovlen = n
    msg.msg_control = control
    msg.msg_controllen = CMSG_SPACE(sizeof(tpacket_auxdata))
    return n


cdef inline void add_le16(uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint32_t v = (p[0] | (p[1] << 8)) + n
    p[0] = <uint8_t>(v & 0xff)
    p[1] = <uint8_t>(v >> 8 & 0xff)


cdef uint8_t *packet_put_tag(mbuf_t *m, uint8_t *hdr) noexcept nogil:
    """Puts back the tag that the kernel took out of a frame, which was received into a slot
    with its virtio-net header at ``hdr``; returns where that header is now."""
    cdef cmsghdr *control = control_of(hdr)
    cdef tpacket_auxdata *aux = <tpacket_auxdata *>CMSG_DATA(control)
    cdef uint32_t tpid = VLAN_TPID
    cdef uint8_t *tag
    if (control.cmsg_len < CMSG_LEN(sizeof(tpacket_auxdata)) or control.cmsg_level != SOL_PACKET
            or control.cmsg_type != PACKET_AUXDATA or not aux.tp_status & TP_STATUS_VLAN_VALID
            or m.data_len < ADDRESSES):
        return hdr
    if aux.tp_status & TP_STATUS_VLAN_TPID_VALID:
        tpid = aux.tp_vlan_tpid
    cdef uint32_t tci = aux.tp_vlan_tci
    memmove(hdr - TAG, hdr, VNET_HDR_LEN + ADDRESSES)       # over the control data
    hdr -= TAG
    m.data_off -= TAG
    m.data_len += TAG
    m.pkt_len += TAG
    tag = mbuf_data(m) + ADDRESSES
    tag[0] = <uint8_t>(tpid >> 8)
    tag[1] = <uint8_t>(tpid & 0xff)
    tag[2] = <uint8_t>(tci >> 8)
    tag[3] = <uint8_t>(tci & 0xff)
    if hdr[1] != VIRTIO_NET_HDR_GSO_NONE:
        add_le16(hdr + 2, TAG)
    if hdr[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        add_le16(hdr + 6, TAG)
    return hdr


cdef bint packet_gone(int fd) noexcept nogil:
    """Whether the interface of a packet socket was deleted or has left its namespace."""
    cdef sockaddr_ll address
    cdef unsigned int n = sizeof(address)
    return getsockname(fd, &address, &n) == 0 and address.sll_ifindex < 0
