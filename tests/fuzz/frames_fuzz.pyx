# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One input for frames, from libFuzzer (see main.c): a program over pools, mbufs, requests, GSO,
GRO and stages.

Each operation is a byte (see ``fuzz_one``) and its operands behind it.  After each one all frames
are compared with a model (frames_model), and in the end every slot has to be back.  The arenas are
poisoned: free slots, gaps, and what lies outside of the window of a frame that nobody else sees.
"""

from libc.errno cimport E2BIG, EINVAL, EIO, EMSGSIZE, ENOBUFS
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from rtap._core.flags cimport RX_L4_CKSUM_NONE, RX_LRO, TX_QINQ, TX_UDP_SEG, TX_VLAN
from rtap.stages._runner cimport (
    STAGE_MERGES, STAGE_SPLITS, chain_drop, chain_holds, chain_run, rtap_burst, scratch_alloc,
    scratch_t, stage_alloc, stage_free, stage_t,
)
from rtap._frames.coalesce cimport gro_burst, gro_drain
from rtap._frames.gro cimport GRO_TRUST, GRO_UDP, gro_create, gro_flush, gro_t
from rtap._core.mempool cimport Mempool
from rtap._core.pool cimport mbuf_data, mbuf_free, mbuf_read, mbuf_t
from rtap._frames.request cimport finish_checksum, take_requests
from rtap._frames.segment cimport gso_part, gso_whole
from rtap._frames.verify cimport fill_frame, fill_unfinished, note_verdict, verify_frame
from rtap.stages._stage cimport Stage

from frames_flat cimport (
    deep, flat_free, flat_of, pieces_add, pieces_free, pieces_t, split_flat, take_equal,
    take_merged, take_next, through_stage,
)
from frames_model cimport (
    HANDLES, LONGEST_FRAME, base_of, claim, count, handle_t, handles, in_table, is_private,
    length_of, model_pool, settle, slot_t, store,
)
from frames_program cimport (
    N_POOLS, PARTS_MAX, buffers, byte, bytes_a, bytes_b, copy_fits, free_in, keep, op_again,
    op_alloc, op_build, op_chain, op_clone, op_free, op_private, op_resize, op_write, pick_frame,
    pools, program, replaced, size,
)

from rtap.stages._checksums import ChecksumFill, ChecksumVerify
from rtap.stages._count import Counter
from rtap.stages._mac import MacRewrite, MacSwap
from rtap.stages._merge import Gro
from rtap.stages._split import Gso
from rtap.stages._spread import Spread
from rtap.stages._tuple import FiveTupleSwap

cdef enum:
    OPERATIONS_MAX = 60
    N_TABLES = 2
    BURST = 16
    ROOM = 24                   # of a burst in a chain: less than a super-frame makes
    CHAIN = 3                   # stages of a chain at most
    N_STAGES = 16
    OUT_MAX = 512
    # stages that are no objects
    DEAL = 13
    FAIL = 14

#: Slots, data room, headroom, memfd: small, middle, as usual, as for reads, few.
POOLS = ((40, 65, 32, False), (32, 255, 16, False), (16, 2048, 128, True),
         (5, 1 << 16, 16, False), (5, 128, 64, False))

cdef gro_t *tables[N_TABLES]
cdef uint64_t patience[N_TABLES]
cdef stage_t stages[N_STAGES]
cdef scratch_t scratch
cdef object kept = []           # what owns all that
cdef pieces_t expected
cdef mbuf_t *out[OUT_MAX]


cdef void op_ask() noexcept nogil:
    """Any TX request."""
    cdef handle_t *h = pick_frame()
    cdef uint32_t flags = byte()
    cdef mbuf_t *m
    if h == NULL or in_table(h.head):
        return
    m = h.head.m
    m.ol_flags = (m.ol_flags & (RX_LRO | RX_L4_CKSUM_NONE) | <uint64_t>(flags & 0x1f) << 50
                  | (TX_VLAN if flags & 0x20 else 0) | (TX_QINQ if flags & 0x40 else 0)
                  | (TX_UDP_SEG if flags & 0x80 else 0))
    m.vlan_tci = 5
    m.vlan_tci_outer = 6
    if flags & 0x80:
        m.l2_len = <uint16_t>byte()
        m.l3_len = <uint16_t>byte()
    else:
        m.l2_len = 14
        m.l3_len = 20
    m.tso_segsz = <uint16_t>max(size(), m.pkt_len // PARTS_MAX + 1)


cdef void op_requests() noexcept nogil:
    cdef handle_t *h = pick_frame()
    cdef bint fits
    cdef uint32_t n, before
    cdef mbuf_t *m
    cdef mbuf_t *flat
    cdef int rc
    if h == NULL:
        return
    before = length_of(h.head)
    fits = is_private(h.head) or copy_fits(h.head)
    flat = flat_of(h.head)
    m = h.head.m
    rc = take_requests(&m, True)
    claim((rc == -ENOBUFS) == (not fits), b"a copy without slots, or none with them")
    if fits:
        n = mbuf_read(m, 0, bytes_a, LONGEST_FRAME)
        claim(n <= before + 8, b"a request that made more than two tags")
        if rc == 0 and not deep(flat):
            claim(take_requests(&flat, True) == 0, b"a request that cannot be done")
            n = flat.data_len
            memcpy(bytes_a, mbuf_data(flat), n)
        replaced(h, m, bytes_a, n)
    flat_free(flat)


cdef void op_finish() noexcept nogil:
    cdef handle_t *h = pick_frame()
    cdef bint fits
    cdef mbuf_t *m
    cdef mbuf_t *flat
    cdef int rc, wanted
    if h == NULL or in_table(h.head):
        return
    fits = is_private(h.head) or copy_fits(h.head)
    flat = flat_of(h.head)
    m = h.head.m
    rc = finish_checksum(&m)
    wanted = finish_checksum(&flat)
    claim(rc == wanted or rc == -ENOBUFS and not fits, b"a checksum finished otherwise")
    if rc == 0:
        replaced(h, m, mbuf_data(flat), flat.data_len)
    flat_free(flat)


cdef bint repeats(slot_t *s) noexcept nogil:
    """Whether a frame shows a slot's bytes twice, as one of clones may."""
    cdef slot_t *other
    while s != NULL:
        other = s.next
        while other != NULL:
            if base_of(s) == base_of(other):
                return True
            other = other.next
        s = s.next
    return False


cdef void op_fill() noexcept nogil:
    """In place, whoever sees it."""
    cdef handle_t *h = pick_frame()
    cdef bint unfinished = byte() & 1
    cdef mbuf_t *flat
    cdef uint64_t found
    cdef int rc
    if h == NULL or in_table(h.head) or repeats(h.head):
        return
    flat = flat_of(h.head)
    if not deep(flat):
        found = verify_frame(h.head.m, True)
        claim(found == verify_frame(flat, True), b"checksums judged otherwise")
        if unfinished:
            rc = fill_unfinished(h.head.m, True)
            claim(rc == fill_unfinished(flat, True), b"filled otherwise")
        else:
            rc = fill_frame(h.head.m, True)
            claim(rc == fill_frame(flat, True), b"filled otherwise")
        store(h.head, 0, mbuf_data(flat), flat.data_len)
        note_verdict(h.head.m, found)
    flat_free(flat)


# ---- one frame into many


cdef void op_split() noexcept nogil:
    """All frames of a super-frame, or some."""
    cdef handle_t *h = pick_frame()
    cdef uint32_t pool = byte() % N_POOLS, room = 1 + size() % (OUT_MAX - 1), how = byte()
    cdef uint32_t first = how >> 2, left = 0, n, need = 0, i, slots
    cdef bint refer = how & 1
    cdef bint lacking
    cdef mbuf_t *m
    cdef int rc, wanted
    if h == NULL or in_table(h.head):
        return
    m = h.head.m
    wanted = split_flat(flat_of(h.head), &expected)
    lacking = not is_private(h.head) and not copy_fits(h.head)
    n = pools[pool].data_room
    for i in range(expected.n):
        need += max((expected.v[i].data_len + n - 1) // n, 1)
    slots = free_in(pool)
    if how & 2:
        rc = gso_part(m, pools[pool], True, refer, first, out, room, &left)
        if rc > 0:
            claim(not expected.unsure and <uint32_t>rc + left + first == expected.n,
                  b"another number of frames")
        elif not expected.unsure:
            claim(rc == (-EINVAL if wanted < 2 or first >= <uint32_t>wanted else -ENOBUFS),
                  b"no part, for no reason")
    else:
        first = 0
        rc = gso_whole(m, pools[pool], True, refer, out, room)
        if expected.unsure or wanted < 2 and lacking and rc == -ENOBUFS:
            pass
        elif wanted > <int>room:
            claim(rc == -EMSGSIZE, b"more frames than there is room for")
        elif wanted > 1 and need > slots or rc < 0 and wanted > 1 and refer:
            claim(rc == wanted or rc == -ENOBUFS or rc == -E2BIG, b"a split that went wrong")
        else:
            claim(rc == wanted, b"split otherwise")
    if rc > 0:
        if left == 0:
            h.head = NULL
        count()
        for i in range(<uint32_t>rc):
            if expected.unsure:
                n = mbuf_read(out[i], 0, bytes_a, LONGEST_FRAME)
                keep(out[i], bytes_a, n)
            else:
                keep(out[i], mbuf_data(expected.v[first + i]), expected.v[first + i].data_len)
    pieces_free(&expected)


# ---- many into one


cdef uint32_t held_by(uint32_t table, handle_t **order) noexcept nogil:
    """Notes what a table has, the earliest first, before it gives some of that out; how many."""
    cdef uint32_t held = 0, i, k
    for i in range(<uint32_t>HANDLES):
        if handles[i].head == NULL or handles[i].table != table:
            continue
        k = held
        while k > 0 and order[k - 1].turn > handles[i].turn:
            order[k] = order[k - 1]
            k -= 1
        order[k] = &handles[i]
        held += 1
    for i in range(held):
        pieces_add(&expected, flat_of(order[i].head))
    return held


cdef bint take_itself(handle_t **order, uint32_t held, const mbuf_t *m, const uint8_t *data,
                      uint32_t n) noexcept nogil:
    """The frame that went in as ``m``, which is then taken: others may have its bytes."""
    cdef uint32_t i
    cdef mbuf_t *v
    for i in range(held):
        v = expected.v[i]
        if (v != NULL and order[i].head.m == m and v.data_len == n
                and memcmp(mbuf_data(v), data, n) == 0):
            flat_free(v)
            expected.v[i] = NULL
            return True
    return False


cdef void came_out(handle_t **order, uint32_t held, uint32_t n) noexcept nogil:
    """``n`` frames in ``out`` that a table was done with."""
    cdef uint32_t i, k, length
    for i in range(n):
        length = mbuf_read(out[i], 0, bytes_b, LONGEST_FRAME)
        claim(length == out[i].pkt_len, b"another pkt_len")
        if not take_itself(order, held, out[i], bytes_b, length) and not take_equal(
                &expected, bytes_b, length, &k):
            claim(take_merged(&expected, out[i], bytes_b, length),
                  b"a super-frame of other frames than those that came")
    for i in range(held):
        if expected.v[i] == NULL:
            order[i].head = NULL
    count()
    for i in range(n):
        length = mbuf_read(out[i], 0, bytes_a, LONGEST_FRAME)
        keep(out[i], bytes_a, length)
    pieces_free(&expected)


cdef void flush(uint32_t table) noexcept nogil:
    cdef handle_t *order[HANDLES]
    cdef uint32_t held = held_by(table + 1, order), i
    gro_flush(tables[table], <uint64_t>-1)
    came_out(order, held, gro_drain(tables[table], out))
    for i in range(<uint32_t>HANDLES):
        claim(handles[i].head == NULL or handles[i].table != table + 1, b"frames lost in a table")


cdef void op_coalesce() noexcept nogil:
    cdef uint32_t table = byte() % N_TABLES, many = byte() % (BURST + 1), got, _i
    cdef uint64_t timed_out = 0
    cdef mbuf_t *v[BURST]
    cdef handle_t *order[HANDLES]
    cdef uint32_t held
    cdef handle_t *h
    program.now += byte()
    got = 0
    for _i in range(many):
        h = pick_frame()
        if h == NULL:
            break
        v[got] = h.head.m
        h.table = table + 1
        h.turn = program.turn
        program.turn += 1
        got += 1
    held = held_by(table + 1, order)
    got = gro_burst(tables[table], v, got, program.now, patience[table], &timed_out, out)
    came_out(order, held, got)


cdef void op_flush() noexcept nogil:
    flush(byte() % N_TABLES)


# ---- stages


cdef int deal(void *ctx, rtap_burst *burst) noexcept nogil:
    """Where a frame goes depends on what is in it; one of them away."""
    cdef mbuf_t **frames = <mbuf_t **>burst.frames
    cdef uint8_t first
    cdef uint32_t i
    for i in range(burst.n):
        first = 0
        mbuf_read(frames[i], 0, &first, 1)
        burst.verdict[i] = first % (burst.n_targets + 1)
    return 0


cdef int fail(void *ctx, rtap_burst *burst) noexcept nogil:
    return -EIO


cdef void check_out(mbuf_t *m, uint32_t target, pieces_t *p, uint32_t *at,
                    bint merged) noexcept nogil:
    """A frame that came out of a chain is one of those that had to."""
    cdef uint32_t n = mbuf_read(m, 0, bytes_a, LONGEST_FRAME), k
    claim(n == m.pkt_len, b"another pkt_len")
    if p.unsure:
        return
    if merged:
        claim(take_equal(p, bytes_a, n, &k) or take_merged(p, m, bytes_a, n),
              b"a super-frame of other frames than those that came")
    else:
        claim(take_next(p, at, bytes_a, n, target),
              b"a frame that is none of those to come, or for another target")


cdef void op_stages() noexcept nogil:
    """A burst through up to three stages, with some targets."""
    cdef uint32_t how = byte(), n_stages = 1 + how % CHAIN, n_targets = 1 + (how >> 2) % 3
    cdef uint32_t many = byte() % (BURST + 1), n = 0, got = 0, failed = 0, at = 0, total = 0, i, k
    cdef bint keeps = how & 0x80 == 0
    cdef bint merged = False
    cdef stage_t chain[CHAIN]
    cdef mbuf_t *frames[ROOM]
    cdef mbuf_t *held[HANDLES]
    cdef uint32_t n_held = 0, _i
    cdef int64_t balance
    cdef uint64_t drops = 0
    cdef handle_t *h
    cdef int rc
    for k in range(n_stages):
        chain[k] = stages[byte() % N_STAGES]
        if stage_alloc(&chain[k], ROOM) != 0:
            return
    for _i in range(many):
        h = pick_frame()
        if h == NULL or in_table(h.head):
            continue
        pieces_add(&expected, flat_of(h.head))
        frames[n] = h.head.m
        h.head = NULL
        n += 1
    balance = n
    for k in range(n_stages):
        if chain[k].flags & STAGE_MERGES:
            expected.unsure |= k + 1 < n_stages
            merged = True
        else:
            through_stage(&chain[k], &expected, n_targets, chain[k].flags & STAGE_SPLITS)
    rc = 0
    while rc == 0 and (n > 0 or chain_holds(chain, n_stages)):
        rc = chain_run(chain, n_stages, n_targets, &scratch, frames, &n, &failed)
        claim(rc == 0 or rc == -EIO, b"an error of nobody's")
        for i in range(n):
            if rc != 0:
                break
            claim(scratch.verdict[i] < n_targets, b"a target that is not there")
            check_out(frames[i], scratch.verdict[i], &expected, &at, merged)
            total += 1
            if keeps and n_held < HANDLES:
                held[n_held] = frames[i]
                n_held += 1
            else:
                mbuf_free(frames[i])
        n = 0
    chain_drop(chain, n_stages)
    for k in range(n_stages):
        balance += <int64_t>chain[k].split - <int64_t>chain[k].merged - <int64_t>chain[k].drops
        drops += chain[k].drops
        stage_free(&chain[k])
    claim(rc != 0 or balance == total, b"frames that were not counted")
    if rc == 0 and not expected.unsure and not merged and (
            drops == 0 or n_stages == 1 and drops == expected.dropped):
        claim(total == expected.n, b"frames that got lost")
    count()
    for i in range(n_held):
        got = mbuf_read(held[i], 0, bytes_a, LONGEST_FRAME)
        keep(held[i], bytes_a, got)
    pieces_free(&expected)


# ---- an input


cdef int fuzz_one(const uint8_t *data, size_t n) noexcept nogil:
    cdef uint32_t what, k, i, _i
    memset(&program, 0, sizeof(program))
    program.data = data
    program.left = n
    program.now = 1000
    for _i in range(<uint32_t>OPERATIONS_MAX):
        if program.left == 0:
            break
        what = byte() % 18
        if what == 0:
            op_alloc()
        elif what <= 2:
            op_build()
        elif what == 3:
            op_free()
        elif what == 4:
            op_clone()
        elif what == 5:
            op_again()
        elif what == 6:
            op_resize()
        elif what == 7:
            op_write()
        elif what == 8:
            op_chain()
        elif what == 9:
            op_private()
        elif what == 10:
            op_ask()
        elif what == 11:
            op_requests()
        elif what == 12:
            op_finish()
        elif what == 13:
            op_fill()
        elif what == 14:
            op_split()
        elif what == 15:
            op_coalesce()
        elif what == 16:
            op_flush()
        else:
            op_stages()
        settle()
    for k in range(<uint32_t>N_TABLES):
        flush(k)
    for i in range(<uint32_t>HANDLES):
        if handles[i].head != NULL:
            mbuf_free(handles[i].head.m)
            handles[i].head = NULL
    settle()
    return 0


cdef void stage_at(uint32_t at, Stage stage) except *:
    stage.enter(&stages[at])
    kept.append(stage)


def address():
    """Where ``int fuzz_one(const uint8_t *, size_t)`` is, with all it works on made."""
    cdef Mempool pool
    cdef uint32_t i
    made = [Mempool(n, room, head, memfd=fd) for n, room, head, fd in POOLS]
    for i in range(N_POOLS):
        pool = made[i]
        kept.append(pool)
        pools[i] = pool.p
        if model_pool(pool.p) != 0:
            raise MemoryError
    for i, stage in enumerate([
            MacSwap(), MacRewrite("02:00:00:00:00:01", "02:00:00:00:00:02"),
            MacRewrite(source="02:00:00:00:00:03"), FiveTupleSwap(), ChecksumFill(),
            ChecksumVerify(drop=False), ChecksumVerify(), Counter(), Spread(), Gso(),
            Gso(made[0]), Gso(made[2]), Gso(made[4])]):
        stage_at(i, stage)
    stages[DEAL].fn = deal
    stages[FAIL].fn = fail
    stage_at(15, Gro(udp=True))
    tables[0] = gro_create(2, 8, GRO_UDP | GRO_TRUST, 3000)
    tables[1] = gro_create(8, HANDLES, GRO_UDP, 65535)
    patience[1] = 300
    memset(&scratch, 0, sizeof(scratch))
    if (buffers() != 0 or tables[0] == NULL or tables[1] == NULL
            or scratch_alloc(&scratch, ROOM, STAGE_MERGES) != 0):
        raise MemoryError
    return <size_t>&fuzz_one
