/* SPDX-License-Identifier: BSD-3-Clause */
#include <stddef.h>
#include <stdint.h>

uint32_t plain_sum16(const uint8_t *p, size_t n);
