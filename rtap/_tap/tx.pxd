# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint32_t, uint64_t

from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport tx_share_t, txq_t
from rtap._tap.tx_gro cimport tx_gro_t
from rtap._tap.tx_split cimport tx_split_t


cdef struct tap_txq_t:
    txq_t base
    uint32_t (*send)(txq_t *q, mbuf_t **v, uint32_t n, int *error) noexcept nogil
    uint64_t file_id
    int engine                  # ENGINE_*
    bint nowait                 # the descriptor takes RWF_NOWAIT
    uint32_t entries            # most frames for each kernel entry
    uint32_t hdr_len            # of the virtio-net header; 0 without
    bint l2                     # Ethernet frames, not IP packets
    uint32_t least              # the least bytes of a frame, where the kernel does not check
    tx_gro_t *gro               # merges frames before they are sent; NULL: sent as they come
    bint shared                 # somebody else may make the descriptor blocking
    bint ordered                # link the writes: the kernel may stop taking frames half-way
    uint32_t software           # GSO_* that the kernel refuses, which are split here
    uint64_t probe_after        # CLOCK_MONOTONIC ns; until then no probe
    tx_split_t *split           # NULL until a super-frame has been split here
    void (*refused)(tap_txq_t *q, uint32_t kind) noexcept nogil     # called for each in `software`
    void *owner                 # for `refused`


cdef uint32_t tx_uring(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil
cdef uint32_t tx_uring_many(tx_share_t *shares, uint32_t k) noexcept nogil
cdef uint32_t tx_checked(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil
cdef uint32_t tx_syscall(txq_t *base, mbuf_t **v, uint32_t n, int *error) noexcept nogil
