// SPDX-License-Identifier: GPL-2.0-only
/* An importer's use of a buffer: by its device, which may fault, and by the CPU. */

#include <linux/delay.h>
#include <linux/dma-resv.h>
#include <linux/iosys-map.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/scatterlist.h>

#include "importer.h"

#define FENCE_WAIT_MS	5000
#define ROUGH_US	25000	/* by which a sleep may be too long */
#define FAULT_TRIES	100
#define FAULT_TRY_MS	10

/*
 * A dynamic importer may have been given what is still being moved or cleared. Before it touches
 * that, it waits for the fences of memory management; so do we, before each access.
 */
static int wait_for_contents(struct import *import)
{
	u64 began = ktime_get_ns();
	long left;

	if (import->manners.hasty)
		return 0;
	left = dma_resv_wait_timeout(import->dmabuf->resv, DMA_RESV_USAGE_KERNEL, false,
				     msecs_to_jiffies(FENCE_WAIT_MS));
	import->waited_ns = ktime_get_ns() - began;
	return left > 0 ? 0 : left ?: -ETIMEDOUT;
}

/*
 * The device found nothing mapped: wait for the contents, and map. The engine's lock is not held:
 * who moves the buffer meanwhile waits for an unmapping, which takes it.
 */
static int import_fault(struct import *import)
{
	u64 began = ktime_get_ns();
	int error = -ENODEV, tries;

	/* While the buffer is on the move nobody maps it; one that was revoked stays so. */
	for (tries = 0; error == -ENODEV && tries < FAULT_TRIES; tries++) {
		if (tries)
			msleep(FAULT_TRY_MS);
		dma_resv_lock(import->dmabuf->resv, NULL);
		error = wait_for_contents(import) ?: import_map_locked(import);
		dma_resv_unlock(import->dmabuf->resv);
	}
	if (error == -EBUSY)	/* by somebody else */
		return 0;
	import->fault_ns = ktime_get_ns() - began;
	import->faults += !error;
	return error;
}

/* Where an offset lies, and how much follows it in one piece; 0 bytes beyond the end. */
static u64 find_piece(struct import *import, u64 offset, dma_addr_t *address)
{
	unsigned int i;

	for (i = 0; i < import->pieces_count; i++) {
		struct piece piece = import->pieces[i];

		if (offset < piece.length) {
			*address = piece.address + offset;
			return piece.length - offset;
		}
		offset -= piece.length;
	}
	return 0;
}

/*
 * Let the device copy between its own memory and the buffer. "stale": by the addresses that were
 * mapped last, whether they still are or not.
 */
int import_dma(struct import *import, bool to_buffer, u64 offset, size_t size, bool stale)
{
	struct engine *engine = import->engine;
	size_t done = 0;
	int error = 0;

	if (!engine || !import->attach || (!import->pieces && !import->manners.ondemand))
		return -ENOTCONN;
	while (true) {
		mutex_lock(&engine->lock);
		/* Under this lock who was told unmaps nothing. */
		if (stale || READ_ONCE(import->table) || !import->manners.ondemand)
			break;
		mutex_unlock(&engine->lock);
		error = import_fault(import);
		if (error)
			return error;
	}
	if (!stale)
		error = READ_ONCE(import->table) ? wait_for_contents(import) : -ENODEV;
	while (!error && done < size) {
		dma_addr_t theirs, ours = engine->bounce_at + done;
		u64 left = find_piece(import, offset + done, &theirs);
		size_t now = min_t(u64, left, size - done);

		if (!now)
			error = -EINVAL;
		else if (to_buffer)
			error = engine->kind->copy(engine, ours, theirs, now);
		else
			error = engine->kind->copy(engine, theirs, ours, now);
		done += now;
	}
	mutex_unlock(&engine->lock);
	return error;
}

/*
 * Unmap while the device is about to write, "after_us" after it was told to; 0: not at all.
 *
 * @begun_ns	how long it took from then until it was done
 * @late_ns	how long after the unmapping that was
 */
int import_late(struct import *import, u64 offset, size_t size, unsigned int after_us,
		u64 *begun_ns, u64 *late_ns)
{
	struct engine *engine = import->engine;
	u64 began, unmapped, done;
	dma_addr_t theirs;
	int error = 0;

	if (!engine || !import->attach)
		return -ENOTCONN;
	if (!engine->kind->begin)
		return -EOPNOTSUPP;
	mutex_lock(&engine->lock);
	if (!READ_ONCE(import->table))
		error = -ENODEV;
	else if (find_piece(import, offset, &theirs) < size)
		error = -EINVAL;
	error = error ?: engine->kind->begin(engine, engine->bounce_at, theirs, size);
	if (error)
		goto unlock;
	began = unmapped = ktime_get_ns();
	if (after_us) {
		if (after_us > ROUGH_US)
			fsleep(after_us - ROUGH_US);
		while (ktime_get_ns() - began < (u64)after_us * NSEC_PER_USEC)
			cpu_relax();
		if (!import->manners.stubborn)
			import_unmap(import);
		unmapped = ktime_get_ns();
	}
	error = engine->kind->finish(engine);
	done = ktime_get_ns();
	*begun_ns = done - began;
	*late_ns = done - unmapped;
unlock:
	mutex_unlock(&engine->lock);
	return error;
}

static void copy(struct import *import, struct iosys_map *at, bool to_buffer, size_t from,
		 size_t size)
{
	if (to_buffer)
		iosys_map_memcpy_to(at, 0, import->engine->bounce + from, size);
	else
		iosys_map_memcpy_from(import->engine->bounce + from, at, 0, size);
}

/* As software RDMA does it: the CPU copies through the pages of the scatter list, if it has any. */
int import_cpu_pages(struct import *import, bool to_buffer, u64 offset, size_t size)
{
	struct scatterlist *entry;
	size_t done = 0;
	unsigned int i;
	int error = 0;

	if (!import->attach)
		return -ENOTCONN;
	dma_resv_lock(import->dmabuf->resv, NULL);
	if (!import->table)
		error = -ENODEV;
	else if (!import->table->orig_nents)
		error = -EOPNOTSUPP;
	error = error ?: wait_for_contents(import);
	if (error)
		goto unlock;
	for_each_sgtable_sg(import->table, entry, i) {
		size_t now;
		struct iosys_map at;

		if (!sg_page(entry)) {
			error = -EOPNOTSUPP;
			break;
		}
		if (offset >= entry->length) {
			offset -= entry->length;
			continue;
		}
		now = min_t(u64, entry->length - offset, size - done);
		iosys_map_set_vaddr(&at, sg_virt(entry) + offset);
		copy(import, &at, to_buffer, done, now);
		done += now;
		offset = 0;
		if (done == size)
			break;
	}
	if (!error && done < size)
		error = -EINVAL;
unlock:
	dma_resv_unlock(import->dmabuf->resv);
	return error;
}

/* The CPU copies through the mapping that the exporter makes for it, if it makes any. */
int import_cpu_vmap(struct import *import, bool to_buffer, u64 offset, size_t size)
{
	struct iosys_map map;
	int error;

	if (!import->attach)
		return -ENOTCONN;
	if (offset + size > import->dmabuf->size)
		return -EINVAL;
	error = dma_buf_vmap_unlocked(import->dmabuf, &map);
	if (error)
		return error;
	if (map.is_iomem) {
		struct iosys_map at = map;

		iosys_map_incr(&at, offset);
		copy(import, &at, to_buffer, 0, size);
	} else {
		error = -EOPNOTSUPP;
	}
	dma_buf_vunmap_unlocked(import->dmabuf, &map);
	return error;
}
