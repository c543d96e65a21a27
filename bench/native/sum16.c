/* SPDX-License-Identifier: BSD-3-Clause
 *
 * The Internet checksum in its simplest form: a loop over 16-bit words. Compiled with -O2.
 */
#include "sum16.h"

uint32_t plain_sum16(const uint8_t *p, size_t n)
{
	const uint16_t *words = (const uint16_t *)p;
	uint32_t total = 0;

	for (; n > 1; n -= 2)
		total += *words++;
	if (n)
		total += *(const uint8_t *)words;
	while (total >> 16)
		total = (total & 0xffff) + (total >> 16);
	return total;
}
