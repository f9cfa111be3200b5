// SPDX-License-Identifier: GPL-2.0-only
/* Scatter lists as dma_buf_phys_vec_to_sgt() wrote them before its 32-bit overflows were mended. */

#include <linux/scatterlist.h>

#include "buffer.h"

/*
 * The kernel has mapped the buffer, and its list is rewritten in place. Addresses of the whole
 * follow from the first entry's, so a buffer of one range is all that can be shown.
 *
 * WRAP_LENGTH	the length of what was linked into one IOVA had 32 bits: the list covers what is left
 *		of it, nothing for 4 GiB; the entries after that are empty
 * WRAP_OFFSET	the number of an entry times UINT_MAX had: the third and later ones lie 4 GiB too low
 */
int wrap_table(struct buffer *buffer, struct sg_table *table)
{
	dma_addr_t start = sg_dma_address(table->sgl);
	u64 left = buffer->mode == WRAP_LENGTH ? lower_32_bits(buffer->size) : buffer->size;
	struct scatterlist *entry;
	unsigned int i;

	if (buffer->count != 1 || table->nents != DIV_ROUND_UP_ULL(buffer->size, UINT_MAX))
		return -EOPNOTSUPP;
	for_each_sgtable_dma_sg(table, entry, i) {
		unsigned int length = min_t(u64, left, UINT_MAX);
		u64 offset = (u64)i * UINT_MAX;

		if (buffer->mode == WRAP_OFFSET)
			offset = lower_32_bits(offset);
		sg_dma_address(entry) = length ? start + offset : 0;
		sg_dma_len(entry) = length;
		left -= length;
	}
	return 0;
}
