# SPDX-License-Identifier: BSD-3-Clause
"""Externs of ``include/rtap_compat.h``: atomics, short locks, the clock, checks."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "rtap_compat.h" nogil:
    const bint POISONS "RTAP_POISONS"
    void check "rtap_assert" (bint holds)
    void poison "rtap_poison" (const void *p, size_t n)
    void unpoison "rtap_unpoison" (const void *p, size_t n)
    uint32_t load "rtap_load" (const uint32_t *p)
    uint32_t load_relaxed "rtap_load_relaxed" (const uint32_t *p)
    uint32_t peek "rtap_peek" (const uint32_t *p)
    void store "rtap_store" (uint32_t *p, uint32_t v)
    uint32_t fetch_add "rtap_fetch_add" (uint32_t *p, uint32_t v)
    uint32_t sub_fetch "rtap_sub_fetch" (uint32_t *p, uint32_t v)
    uint32_t exchange "rtap_exchange" (uint32_t *p, uint32_t v)
    bint cas "rtap_cas" (uint32_t *p, uint32_t expected, uint32_t desired)
    uint64_t counter_read "rtap_counter_read" (const uint64_t *p)
    void counter_set "rtap_counter_set" (uint64_t *p, uint64_t v)
    void counter_add "rtap_counter_add" (uint64_t *p, uint64_t v)
    bint trylock "rtap_trylock" (uint32_t *lock)
    void lock "rtap_lock" (uint32_t *lock)
    void unlock "rtap_unlock" (uint32_t *lock)
    void step_lock "rtap_step_lock" (uint32_t *lock)
    void step_unlock "rtap_step_unlock" (uint32_t *lock)
    uint64_t now_ns "rtap_now_ns" ()
    uint64_t cycles "rtap_cycles" ()
    void shared_add "rtap_shared_add" (uint64_t *p, uint64_t v)
    # Words that processes share.
    uint64_t load64 "rtap_load64" (const uint64_t *p)
    void store64 "rtap_store64" (uint64_t *p, uint64_t v)
    bint cas64 "rtap_cas64" (uint64_t *p, uint64_t expected, uint64_t desired)
    void add64 "rtap_add64" (uint64_t *p, uint64_t v)
    void snapshot "rtap_snapshot" (uint64_t *to, const uint64_t *source, uint32_t words)
    uint8_t exchange8 "rtap_exchange8" (uint8_t *p, uint8_t v)
    void store8 "rtap_store8" (uint8_t *p, uint8_t v)
    uint32_t fetch_or "rtap_fetch_or" (uint32_t *p, uint32_t v)
    uint32_t fetch_and "rtap_fetch_and" (uint32_t *p, uint32_t v)
    void fence "rtap_fence" ()
    void prefetch "rtap_prefetch" (const void *p)
    bint whole_words "rtap_whole_words" ()
    void futex_wait "rtap_futex_wait" (uint32_t *word, uint32_t value, int ms)
    void futex_wake "rtap_futex_wake" (uint32_t *word)
