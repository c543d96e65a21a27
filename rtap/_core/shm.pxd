# SPDX-License-Identifier: BSD-3-Clause
"""Slots that several processes share: which of them holds each one.

The arena of a shared pool lies in a sealed memfd, behind a header and two tables: a word for each
slot that says who holds it, and what travels with the slot when another process takes it.  There is
no free list and no lock that a process could die with: a slot is in one place, and moves in one
step, the change of its word.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cimport rtap._core.compat as _compat


cdef enum:
    SHM_MEMBERS = 64            # processes that have the pool mapped, each mapping one member
    SHM_RINGS = 256
    SHM_SLOTS_MAX = 1 << 22
    SHM_REST = 36               # bytes of mbuf_t from packet_type to step

    # The lowest byte of an owner word; the next three are a number
    OWNER_FREE = 0
    OWNER_MEMBER = 1            # a process: its number
    OWNER_RING = 2              # published: the number of the ring
    OWNER_SEG = 3               # a later segment: the first one's slot, and that slot's version


cdef struct slot_t:             # what travels with a slot; only its holder writes it
    uint64_t ol_flags
    uint32_t data_off
    uint32_t data_len
    uint32_t next               # the next segment's slot and 1, or 0
    uint32_t version            # of a later segment, whose word has the first one's
    uint16_t nb_segs
    uint16_t port
    uint8_t rest[SHM_REST]


cdef struct shm_t:              # one mapping, of one process
    uint64_t id
    uint8_t *base
    uint64_t total
    uint8_t *arena
    uint64_t *owners
    slot_t *slots
    uint64_t *frees             # of slots, ever: when it stands still, an empty pool stays empty
    uint8_t *mine               # slots whose headers this process uses, whatever the words say
    uint32_t size
    uint32_t data_room
    uint32_t headroom
    uint32_t me                 # number of this member,
    uint64_t word               # and its owner word, without the version
    uint32_t held               # slots in `mine`, those in caches too
    uint32_t hint               # where the next search for free slots begins
    int fd
    int lock_fd                 # an open file description of its own, which holds its locks
    uint32_t inherited          # this is a forked child: all belongs to the parent
    uint32_t lock               # guards `opened`, and the locks of others while they are probed
    bint exhausted              # the last search found none,
    uint64_t exhausted_frees    # when `frees` was this,
    uint64_t exhausted_at       # at this time
    uint32_t opened[SHM_RINGS]  # how often this process has each ring open
    shm_t *next_shm             # all of the process


cdef inline uint32_t owner_kind(uint64_t word) noexcept nogil:
    return <uint32_t>word & 0xff


cdef inline uint32_t owner_number(uint64_t word) noexcept nogil:
    return <uint32_t>word >> 8


cdef inline uint32_t owner_version(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 32)


cdef inline uint64_t owner_word(uint32_t kind, uint32_t number, uint32_t version) noexcept nogil:
    return <uint64_t>version << 32 | <uint64_t>number << 8 | kind


cdef inline bint shm_holds(const shm_t *s, uint64_t word) noexcept nogil:
    """Whether an owner word names this member."""
    return <uint32_t>word == <uint32_t>s.word


cdef inline bint shm_claim(shm_t *s, uint32_t slot, uint64_t word, uint32_t later) noexcept nogil:
    """Takes a slot, whose owner word was ``word``, and makes it ``later`` versions newer; false
    when somebody else was faster, or when this process has it already, which only a wrong word
    can bring about."""
    cdef uint64_t now = s.word | <uint64_t>(owner_version(word) + later) << 32
    return _compat.cas64(&s.owners[slot], word, now) and _compat.exchange8(&s.mine[slot], 1) == 0


cdef inline void shm_release(shm_t *s, uint32_t slot) noexcept nogil:
    """Frees a slot that this process holds; ``shm_freed`` follows, for all of them."""
    cdef uint64_t word
    _compat.store8(&s.mine[slot], 0)
    if s.inherited == 0:
        word = _compat.load64(&s.owners[slot])
        if shm_holds(s, word):
            _compat.store64(&s.owners[slot], owner_word(OWNER_FREE, 0, owner_version(word)))


cdef int shm_create(shm_t **out, const char *name, uint64_t id, uint32_t n, uint32_t data_room,
                    uint32_t headroom) noexcept nogil
cdef int shm_attach(shm_t **out, int fd, const char **why) noexcept nogil
cdef void shm_leave(shm_t *s) noexcept nogil
cdef uint32_t shm_take(shm_t *s, uint32_t *out, uint32_t n) noexcept nogil
cdef void shm_freed(shm_t *s, uint32_t n) noexcept nogil
cdef uint32_t shm_free_slots(const shm_t *s) noexcept nogil
cdef uint32_t shm_reclaim(shm_t *s) noexcept nogil
cdef int shm_ring_number(shm_t *s) noexcept nogil
cdef int shm_ring_open(shm_t *s, uint32_t number) noexcept nogil
cdef void shm_ring_close(shm_t *s, uint32_t number) noexcept nogil
