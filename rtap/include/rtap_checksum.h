/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The loop of the Internet checksum (RFC 1071).  It adds the 32-bit halves of 64-bit words in two
 * 64-bit accumulators, which compilers turn into vector instructions.  The sum does not depend on
 * the byte order and the width of the words (RFC 1071, section 2).
 */
#ifndef RTAP_CHECKSUM_H
#define RTAP_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One build for all x86-64 processors: the dynamic linker takes the widest version that runs.
 * A resolver runs before a sanitizer is ready, so sanitized builds have the first version only. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && \
	!defined(RTAP_NO_CLONES) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12
#define RTAP_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define RTAP_CLONES
#endif

/* Sum of n bytes in native byte order, n a multiple of 8; not folded. */
RTAP_CLONES
static uint64_t rtap_sum_long(const uint8_t *p, size_t n)
{
	uint64_t low = 0, high = 0, word;
	size_t i;

	for (i = 0; i < n; i += 8) {
		memcpy(&word, p + i, 8);
		low += word & 0xffffffffu;
		high += word >> 32;
	}
	/* Each is less than 2^33 for every 2^32 bytes, and a carry of 2^32 is worth 1. */
	return (low & 0xffffffffu) + (low >> 32) + (high & 0xffffffffu) + (high >> 32);
}

/* The same, and copies the bytes on the way. */
RTAP_CLONES
static uint64_t rtap_copy_sum_long(uint8_t *restrict to, const uint8_t *restrict p, size_t n)
{
	uint64_t low = 0, high = 0, word;
	size_t i;

	for (i = 0; i < n; i += 8) {
		memcpy(&word, p + i, 8);
		memcpy(to + i, &word, 8);
		low += word & 0xffffffffu;
		high += word >> 32;
	}
	return (low & 0xffffffffu) + (low >> 32) + (high & 0xffffffffu) + (high >> 32);
}

/* The halves are added to each other both ways, so the upper one includes its own carry. */
static inline uint32_t rtap_fold16(uint64_t total)
{
	uint32_t half;

	total += total << 32 | total >> 32;
	half = (uint32_t)(total >> 32);
	half += half << 16 | half >> 16;
	return half >> 16;
}

#define RTAP_SUM_SHORT 128

/* The carry out of the top is worth 1. */
static inline uint64_t rtap_add(uint64_t total, uint64_t word)
{
	total += word;
	return total + (total < word);
}

/* Adds up to 7 bytes to a sum in native byte order, folds it and turns it to big-endian words. */
static inline uint32_t rtap_sum_end(uint64_t total, const uint8_t *p, size_t n)
{
	uint64_t rest = 0;
	uint32_t half, folded;
	uint16_t quarter;

	if (n & 4) {
		memcpy(&half, p, 4);
		rest += half;
		p += 4;
	}
	if (n & 2) {
		memcpy(&quarter, p, 2);
		rest += quarter;
		p += 2;
	}
	if (n & 1) {
		quarter = 0;
		memcpy(&quarter, p, 1);
		rest += quarter;
	}
	total = rtap_add(total, rest);
	folded = rtap_fold16(total);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	folded = (folded & 0xff) << 8 | folded >> 8;
#endif
	return folded;
}

/* Sum of n bytes as big-endian 16-bit words, an odd last byte being the high half of one; folded
 * to 0..0xffff and not complemented. */
static inline uint32_t rtap_sum16(const uint8_t *p, size_t n)
{
	uint64_t total = 0, word;
	size_t whole;

	if (n >= RTAP_SUM_SHORT) {
		whole = n & ~(size_t)7;
		total = rtap_sum_long(p, whole);
		p += whole;
		n -= whole;
	}
	for (; n >= 8; p += 8, n -= 8) {
		memcpy(&word, p, 8);
		total = rtap_add(total, word);
	}
	return rtap_sum_end(total, p, n);
}

/* Copies n bytes between places that do not overlap, and sums them like rtap_sum16. */
static inline uint32_t rtap_copy_sum16(uint8_t *restrict to, const uint8_t *restrict p, size_t n)
{
	uint64_t total;
	size_t whole;

	if (n < RTAP_SUM_SHORT) {
		memcpy(to, p, n);
		return rtap_sum16(to, n);
	}
	whole = n & ~(size_t)7;
	total = rtap_copy_sum_long(to, p, whole);
	memcpy(to + whole, p + whole, n - whole);
	return rtap_sum_end(total, p + whole, n - whole);
}

#endif
