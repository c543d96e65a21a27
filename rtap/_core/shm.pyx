# SPDX-License-Identifier: BSD-3-Clause
"""The tables of a shared pool: members, owners of slots, and what a dead member leaves behind.

A **word** for each slot says who holds it: nobody, a member, a ring, or, for a later segment of a
frame in a ring, the frame's first slot.  It also has a version, which goes up whenever a process
takes the slot.  What still refers to an older version is out of date.  A slot moves by a
compare-and-swap of its word, so a process that is killed between any two instructions leaves every
slot in exactly one place.

A **member** is a number that a process holds by a lock on the byte of that number in the memfd.
The lock belongs to an open file description that nobody else has, and the kernel drops it when the
process ends, however it ends.  Whoever can take a member's lock has proved that it is dead, and
frees its slots while it has the lock.  Who gets the number of a dead member does the same first.
Rings have bytes, too: each process that has a ring open shares the lock, and what lies in a ring
that nobody has open is freed.

No other process is trusted: numbers out of shared memory are read once and checked, and the headers
of slots are each process's own.  ``mine`` says which of them are in use here, so no word that
another process writes makes two frames out of one header.
"""

from libc.errno cimport EBUSY, EINVAL, ENOMEM, ENOSYS, EUSERS, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cimport rtap._core.compat as _compat
from rtap._core.linux cimport (
    F_DUPFD_CLOEXEC, F_RDLCK, F_UNLCK, F_WRLCK, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE,
    close, fcntl, lock_byte, mmap, munmap, open_again, pread, pthread_atfork, usleep,
)
from rtap._core.memfd cimport memfd_flaw, memfd_make

cdef enum:
    PAGE = 4096
    LINE = 64
    FREES_AT = 128
    OWNERS_AT = PAGE
    FORMAT = 2
    ROOM_MIN = 64
    ROOM_MAX = 1 << 24
    HEADROOM_MIN = 16
    HEADROOM_MAX = 4096
    AGAIN_NS = 10_000_000       # an empty pool is searched so often although nobody frees anything
    PROBE_US = 1000             # a reclaimer may hold a lock for a moment
    PROBES = 50

cdef uint64_t MAGIC = 0x006c6f6f70706174        # "tappool"

cdef struct head_t:
    uint64_t magic
    uint64_t id
    uint32_t format
    uint32_t size
    uint32_t data_room
    uint32_t headroom
    uint64_t total

cdef shm_t *all_shm = NULL
cdef uint32_t list_lock = 0


cdef shm_t *layout(uint32_t n, uint32_t data_room, uint32_t headroom) noexcept nogil:
    """The state of a pool of that geometry, not mapped yet; NULL without memory."""
    cdef shm_t *s = <shm_t *>calloc(1, sizeof(shm_t))
    cdef uint64_t stride = (<uint64_t>headroom + data_room + LINE - 1) & ~<uint64_t>(LINE - 1)
    if s == NULL:
        return NULL
    s.fd = s.lock_fd = -1
    s.size = n
    s.data_room = data_room
    s.headroom = headroom
    s.mine = <uint8_t *>calloc(n, 1)
    # As in pool_create, a header may be read in one piece over the end of the last slot.
    s.total = arena_at(n) + ((stride * n + LINE + PAGE - 1) & ~<uint64_t>(PAGE - 1))
    if s.mine == NULL:
        free(s)
        return NULL
    return s


cdef inline uint64_t slots_at(uint32_t n) noexcept nogil:
    return (<uint64_t>OWNERS_AT + <uint64_t>n * sizeof(uint64_t) + LINE - 1) & ~<uint64_t>(LINE - 1)


cdef inline uint64_t arena_at(uint32_t n) noexcept nogil:
    return (slots_at(n) + <uint64_t>n * sizeof(slot_t) + PAGE - 1) & ~<uint64_t>(PAGE - 1)


cdef int map_in(shm_t *s) noexcept nogil:
    if s.total > (<size_t>-1) // 2:
        return -ENOMEM
    s.base = <uint8_t *>mmap(NULL, <size_t>s.total, PROT_READ | PROT_WRITE, MAP_SHARED, s.fd, 0)
    if <void *>s.base == MAP_FAILED:
        s.base = NULL
        return -errno
    s.frees = <uint64_t *>(s.base + FREES_AT)
    s.owners = <uint64_t *>(s.base + OWNERS_AT)
    s.slots = <slot_t *>(s.base + slots_at(s.size))
    s.arena = s.base + arena_at(s.size)
    return 0


cdef int join(shm_t *s) noexcept nogil:
    """Becomes a member, and frees what an earlier one of that number has left; 0 or -errno."""
    global all_shm
    cdef uint8_t members[SHM_MEMBERS]
    cdef uint8_t rings[SHM_RINGS]
    cdef uint32_t i, _turn
    _compat.lock(&list_lock)            # a child forked meanwhile would keep the description
    s.lock_fd = open_again(s.fd)
    s.next_shm = all_shm
    all_shm = s
    _compat.unlock(&list_lock)
    if s.lock_fd < 0:
        return s.lock_fd
    for _turn in range(<uint32_t>PROBES):
        for i in range(<uint32_t>SHM_MEMBERS):
            if lock_byte(s.lock_fd, F_WRLCK, i) == 0:
                s.me = i
                s.word = owner_word(OWNER_MEMBER, i, 0)
                s.hint = <uint32_t>(<uint64_t>s.size * i // SHM_MEMBERS)
                memset(members, 0, sizeof(members))
                memset(rings, 0, sizeof(rings))
                members[i] = 1
                sweep(s, members, rings)
                return 0
        usleep(PROBE_US)
    return -EUSERS


cdef int shm_create(shm_t **out, const char *name, uint64_t id, uint32_t n, uint32_t data_room,
                    uint32_t headroom) noexcept nogil:
    """Makes the memfd and maps it; 0 or -errno."""
    cdef shm_t *s
    cdef head_t *head
    cdef int rc
    if not _compat.whole_words():
        return -ENOSYS
    s = layout(n, data_room, headroom)
    if s == NULL:
        return -ENOMEM
    s.id = id
    rc = s.fd = memfd_make(name, s.total)
    if rc >= 0:
        rc = map_in(s)
    if rc == 0:
        head = <head_t *>s.base
        head.id = id
        head.format = FORMAT
        head.size = n
        head.data_room = data_room
        head.headroom = headroom
        head.total = s.total
        rc = join(s)
        _compat.store64(&head.magic, MAGIC)
    if rc != 0:
        shm_leave(s)
        return rc
    out[0] = s
    return 0


cdef int shm_attach(shm_t **out, int fd, const char **why) noexcept nogil:
    """Maps a pool that another process has made.  0; -EINVAL, with the reason in ``why``; or
    another -errno."""
    cdef shm_t *s
    cdef head_t head            # a copy, which nobody changes any more
    cdef uint64_t total = 0
    cdef int rc
    if not _compat.whole_words():
        return -ENOSYS
    why[0] = memfd_flaw(fd, &total)
    if why[0] != NULL:
        return -EINVAL
    if total < PAGE or pread(fd, &head, sizeof(head), 0) != <ssize_t>sizeof(head):
        why[0] = "it is too small"
        return -EINVAL
    if head.magic != MAGIC:
        why[0] = "it is not a shared pool"
        return -EINVAL
    if head.format != FORMAT:
        why[0] = "its format is of another version of rtap"
        return -EINVAL
    if not (1 <= head.size <= <uint32_t>SHM_SLOTS_MAX
            and <uint32_t>ROOM_MIN <= head.data_room <= <uint32_t>ROOM_MAX
            and <uint32_t>HEADROOM_MIN <= head.headroom <= <uint32_t>HEADROOM_MAX):
        why[0] = "sizes in its header are out of range"
        return -EINVAL
    s = layout(head.size, head.data_room, head.headroom)
    if s == NULL:
        return -ENOMEM
    if s.total != total or head.total != total:
        shm_leave(s)
        why[0] = "its size is not the one that its header tells"
        return -EINVAL
    s.id = head.id
    rc = s.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    rc = map_in(s) if rc >= 0 else -errno
    if rc == 0:
        rc = join(s)
    if rc != 0:
        shm_leave(s)
        return rc
    out[0] = s
    return 0


cdef void shm_leave(shm_t *s) noexcept nogil:
    """Unmaps; with its description, the member's locks go.  All its slots are back."""
    cdef shm_t **link = &all_shm
    _compat.lock(&list_lock)
    while link[0] != NULL and link[0] != s:
        link = &link[0].next_shm
    if link[0] == s:
        link[0] = s.next_shm
    _compat.unlock(&list_lock)
    if s.lock_fd >= 0:
        close(s.lock_fd)
    if s.base != NULL:
        munmap(s.base, <size_t>s.total)
    if s.fd >= 0:
        close(s.fd)
    free(s.mine)
    free(s)


cdef uint32_t search(shm_t *s, uint32_t *out, uint32_t n) noexcept nogil:
    """Takes free slots, in address order; fewer than ``n`` when one round finds no more."""
    cdef uint32_t got = 0, i = s.hint, _step
    cdef uint64_t word
    for _step in range(s.size):
        if got == n:
            break
        word = _compat.counter_read(&s.owners[i])
        # A frame that was published by a process that died, and freed, may still be taken from its
        # ring as one version newer.
        if owner_kind(word) == OWNER_FREE and shm_claim(s, i, word, 2):
            out[got] = i
            got += 1
        i += 1
        if i == s.size:
            i = 0
    s.hint = i
    _compat.fetch_add(&s.held, got)
    return got


cdef uint32_t shm_take(shm_t *s, uint32_t *out, uint32_t n) noexcept nogil:
    """Takes up to ``n`` free slots; returns how many.  Under the pool's lock.

    An empty pool is not searched again before somebody frees a slot.  A process may die before it
    has counted that, so now and then it is searched nevertheless, also for what the dead had."""
    cdef uint64_t frees, now
    cdef uint32_t got
    if s.inherited != 0:
        return 0
    frees = _compat.load64(s.frees)
    if s.exhausted and frees == s.exhausted_frees:
        now = _compat.now_ns()
        if now - s.exhausted_at < <uint64_t>AGAIN_NS:
            return 0
    got = search(s, out, n)
    s.exhausted = got < n
    if not s.exhausted:
        return got
    now = _compat.now_ns()
    s.exhausted_frees = frees
    if now - s.exhausted_at >= <uint64_t>AGAIN_NS:
        s.exhausted_at = now
        if shm_reclaim(s) > 0:
            got += search(s, out + got, n - got)
    return got


cdef void shm_freed(shm_t *s, uint32_t n) noexcept nogil:
    """Counts slots that were released."""
    _compat.sub_fetch(&s.held, n)
    if s.inherited == 0:
        _compat.add64(s.frees, n)


cdef uint32_t shm_free_slots(const shm_t *s) noexcept nogil:
    cdef uint32_t n = 0, i
    for i in range(s.size):
        n += owner_kind(_compat.counter_read(&s.owners[i])) == OWNER_FREE
    return n


cdef bint is_orphan(const shm_t *s, uint64_t word) noexcept nogil:
    """Whether a later segment's frame is gone: its first slot is free, or somebody has taken it for
    another frame.  A process that takes the frame makes that slot one version newer, then takes
    the segments."""
    cdef uint32_t first = owner_number(word)
    cdef uint64_t head
    if first >= s.size:
        return True
    head = _compat.load64(&s.owners[first])
    return owner_kind(head) == OWNER_FREE or (
        owner_version(head) - owner_version(word) > 1)


cdef uint32_t sweep(shm_t *s, const uint8_t *members, const uint8_t *rings) noexcept nogil:
    """Frees the slots of members and rings whose locks this process holds, then the segments of
    frames that are gone; returns how many."""
    cdef uint32_t n = 0, i, kind, number
    cdef uint64_t word, freed
    cdef bint segments = False
    for i in range(s.size):
        word = _compat.load64(&s.owners[i])
        kind = owner_kind(word)
        number = owner_number(word)
        if kind == OWNER_SEG:
            segments = True
        elif (kind == OWNER_MEMBER and number < <uint32_t>SHM_MEMBERS and members[number] != 0
              or kind == OWNER_RING and number < <uint32_t>SHM_RINGS and rings[number] != 0):
            freed = owner_word(OWNER_FREE, 0, owner_version(word))
            n += _compat.cas64(&s.owners[i], word, freed)
    if segments:
        for i in range(s.size):
            word = _compat.load64(&s.owners[i])
            if owner_kind(word) == OWNER_SEG and is_orphan(s, word):
                freed = owner_word(OWNER_FREE, 0, _compat.load_relaxed(&s.slots[i].version))
                n += _compat.cas64(&s.owners[i], word, freed)
    if n > 0:
        _compat.add64(s.frees, n)
    return n


cdef uint32_t shm_reclaim(shm_t *s) noexcept nogil:
    """Frees what dead members and forgotten rings hold; returns how many slots.

    Asks the kernel only about those that a word names.  Dying in the middle is no harm."""
    cdef uint8_t members[SHM_MEMBERS]
    cdef uint8_t rings[SHM_RINGS]
    cdef uint32_t i, kind, number, n = 0
    cdef bint found = False
    cdef uint64_t word
    if s.inherited != 0 or not _compat.trylock(&s.lock):
        return 0
    memset(members, 0, sizeof(members))
    memset(rings, 0, sizeof(rings))
    for i in range(s.size):
        word = _compat.counter_read(&s.owners[i])
        kind = owner_kind(word)
        number = owner_number(word)
        if kind == OWNER_MEMBER and number < <uint32_t>SHM_MEMBERS:
            members[number] = 1
        elif kind == OWNER_RING and number < <uint32_t>SHM_RINGS:
            rings[number] = 1
        elif kind == OWNER_SEG:
            found = True
    # This process would get its own locks, too, and then drop them.
    members[s.me] = 0
    for i in range(<uint32_t>SHM_MEMBERS):
        members[i] = members[i] != 0 and lock_byte(s.lock_fd, F_WRLCK, i) == 0
        found |= members[i]
    for i in range(<uint32_t>SHM_RINGS):
        rings[i] = (rings[i] != 0 and s.opened[i] == 0
                    and lock_byte(s.lock_fd, F_WRLCK, SHM_MEMBERS + i) == 0)
        found |= rings[i]
    if found:
        n = sweep(s, members, rings)
    for i in range(<uint32_t>SHM_MEMBERS):
        if members[i] != 0:
            lock_byte(s.lock_fd, F_UNLCK, i)
    for i in range(<uint32_t>SHM_RINGS):
        if rings[i] != 0:
            lock_byte(s.lock_fd, F_UNLCK, SHM_MEMBERS + i)
    _compat.unlock(&s.lock)
    return n


cdef int shm_ring_number(shm_t *s) noexcept nogil:
    """A number for a new ring, which this process then has open; -EUSERS when all are taken."""
    cdef uint8_t members[SHM_MEMBERS]
    cdef uint8_t rings[SHM_RINGS]
    cdef int found = -EUSERS
    cdef uint32_t i
    memset(members, 0, sizeof(members))
    memset(rings, 0, sizeof(rings))
    _compat.lock(&s.lock)
    for i in range(<uint32_t>SHM_RINGS):
        if s.opened[i] == 0 and lock_byte(s.lock_fd, F_WRLCK, SHM_MEMBERS + i) == 0:
            rings[i] = 1
            sweep(s, members, rings)
            lock_byte(s.lock_fd, F_RDLCK, SHM_MEMBERS + i)      # in one step
            s.opened[i] = 1
            found = <int>i
            break
    _compat.unlock(&s.lock)
    return found


cdef int shm_ring_open(shm_t *s, uint32_t number) noexcept nogil:
    """This process has that ring open from now on; 0 or -errno."""
    cdef int rc = 0
    cdef uint32_t _turn
    for _turn in range(<uint32_t>PROBES):
        _compat.lock(&s.lock)
        if s.opened[number] == 0:
            rc = lock_byte(s.lock_fd, F_RDLCK, SHM_MEMBERS + number)
        if rc == 0:
            s.opened[number] += 1
        _compat.unlock(&s.lock)
        if rc == 0:
            return 0
        usleep(PROBE_US)        # somebody frees what lay in it
        rc = 0
    return -EBUSY


cdef void shm_ring_close(shm_t *s, uint32_t number) noexcept nogil:
    """The last process that closes a ring frees what lies in it."""
    cdef uint8_t members[SHM_MEMBERS]
    cdef uint8_t rings[SHM_RINGS]
    if s.inherited != 0:
        return
    memset(members, 0, sizeof(members))
    memset(rings, 0, sizeof(rings))
    _compat.lock(&s.lock)
    s.opened[number] -= 1
    if s.opened[number] == 0:
        if lock_byte(s.lock_fd, F_WRLCK, SHM_MEMBERS + number) == 0:
            rings[number] = 1
            sweep(s, members, rings)
        lock_byte(s.lock_fd, F_UNLCK, SHM_MEMBERS + number)
    _compat.unlock(&s.lock)


cdef void before_fork() noexcept nogil:
    _compat.lock(&list_lock)


cdef void after_fork_in_parent() noexcept nogil:
    _compat.unlock(&list_lock)


cdef void after_fork_in_child() noexcept nogil:
    """A parent that dies must not look alive because its child has its locks."""
    cdef shm_t *s = all_shm
    while s != NULL:
        if s.lock_fd >= 0:
            close(s.lock_fd)
            s.lock_fd = -1
        s.inherited = 1
        s = s.next_shm
    _compat.unlock(&list_lock)


if pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0:
    raise MemoryError("cannot watch for fork")
