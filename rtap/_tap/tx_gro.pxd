# SPDX-License-Identifier: BSD-3-Clause
from libc.stdint cimport uint8_t, uint32_t

from rtap._core.pool cimport mbuf_t
from rtap._core.queue cimport txq_t
from rtap._frames.gro cimport gro_t


ctypedef uint32_t (*tx_send_fn)(txq_t *q, mbuf_t **v, uint32_t n, int *error) noexcept nogil


cdef struct tx_gro_t:
    # The memory of one pass; it is empty between bursts.
    gro_t *table
    mbuf_t *segs                # segments of super-frames: borrowed bytes, no slots
    uint8_t *headers            # of the super-frames
    mbuf_t **out                # the frames that the pass sends
    mbuf_t **unsent


cdef tx_gro_t *tx_gro_create(bint udp, bint l2) noexcept nogil
cdef void tx_gro_destroy(tx_gro_t *t) noexcept nogil
cdef uint32_t tx_gro(tx_gro_t *t, tx_send_fn send, txq_t *q, mbuf_t **v, uint32_t n,
                     int *error) noexcept nogil
cdef uint32_t tx_gro_frames(const tx_gro_t *t, const mbuf_t *m) noexcept nogil
