// SPDX-License-Identifier: GPL-2.0-only
/* An importer's side of a dma-buf: attach, map, use by device or CPU, be told that it ends. */

#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/iosys-map.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "importer.h"
#include "plain_fence.h"

#define SHOWN_ENTRIES	64
#define FENCE_WAIT_MS	5000
#define ROUGH_US	25000	/* by which a sleep may be too long */
#define FAULT_TRIES	100
#define FAULT_TRY_MS	10

/* The reservation lock is held. */
static void unmap_now(struct import *import)
{
	u64 began = ktime_get_ns();

	if (!import->table)
		return;
	dma_buf_unmap_attachment(import->attach, import->table, DMA_BIDIRECTIONAL);
	import->table = NULL;
	import->unmap_ns = ktime_get_ns() - began;
}

static void unmap_later(struct work_struct *work)
{
	struct import *import = container_of(work, struct import, unmap.work);

	/* The lock of the engine first: what it copies now ends before the mapping does. */
	mutex_lock(&import->engine->lock);
	dma_resv_lock(import->dmabuf->resv, NULL);
	unmap_now(import);
	dma_resv_unlock(import->dmabuf->resv);
	mutex_unlock(&import->engine->lock);
}

/* Called with the reservation lock held, so the unmapping is left to a worker. */
static void invalidate(struct dma_buf_attachment *attach)
{
	struct import *import = attach->importer_priv;

	import->invalidated++;
	if (!import->manners.stubborn)
		schedule_delayed_work(&import->unmap, msecs_to_jiffies(import->manners.delay_ms));
}

static const struct dma_buf_attach_ops importer_ops[2][2] = {	/* [peer2peer][revocable] */
	{ { .allow_peer2peer = false }, { .invalidate_mappings = invalidate } },
	{ { .allow_peer2peer = true },
	  { .allow_peer2peer = true, .invalidate_mappings = invalidate } },
};

static void signal_later(struct work_struct *work)
{
	struct import *import = container_of(work, struct import, signal.work);

	dma_fence_signal(import->fence);
}

void import_init(struct import *import)
{
	INIT_DELAYED_WORK(&import->unmap, unmap_later);
	INIT_DELAYED_WORK(&import->signal, signal_later);
}

int import_attach(struct import *import, struct engine *engine, int fd,
		  const struct manners *manners)
{
	struct device *device = &engine->pdev->dev;
	struct dma_buf_attachment *attach;
	int error;

	error = dma_set_mask(device, DMA_BIT_MASK(manners->mask));
	if (error)
		return error;
	import->dmabuf = dma_buf_get(fd);
	if (IS_ERR(import->dmabuf))
		return PTR_ERR(import->dmabuf);
	import->engine = engine;
	import->manners = *manners;
	import->invalidated = 0;
	import->faults = 0;
	import->fault_ns = import->waited_ns = 0;
	if (manners->dynamic)
		attach = dma_buf_dynamic_attach(
			import->dmabuf, device,
			&importer_ops[manners->peer2peer][manners->revocable], import);
	else
		attach = dma_buf_attach(import->dmabuf, device);
	if (IS_ERR(attach)) {
		error = PTR_ERR(attach);
		goto put;
	}
	import->attach = attach;
	if (manners->pinned) {
		dma_resv_lock(import->dmabuf->resv, NULL);
		error = dma_buf_pin(attach);
		dma_resv_unlock(import->dmabuf->resv);
		if (error) {
			dma_buf_detach(import->dmabuf, attach);
			import->attach = NULL;
			goto put;
		}
	}
	return 0;
put:
	dma_buf_put(import->dmabuf);
	import->dmabuf = NULL;
	return error;
}

static void drop_fence(struct import *import)
{
	if (!import->fence)
		return;
	if (cancel_delayed_work_sync(&import->signal))
		dma_fence_signal(import->fence);
	dma_fence_put(import->fence);
	import->fence = NULL;
}

void import_detach(struct import *import)
{
	if (!import->attach)
		return;
	drop_fence(import);
	cancel_delayed_work_sync(&import->unmap);
	import_unmap(import);
	if (import->manners.pinned) {
		dma_resv_lock(import->dmabuf->resv, NULL);
		dma_buf_unpin(import->attach);
		dma_resv_unlock(import->dmabuf->resv);
	}
	dma_buf_detach(import->dmabuf, import->attach);
	/* Nobody calls invalidate() any more; what it queued last has nothing left to unmap. */
	cancel_delayed_work_sync(&import->unmap);
	import->attach = NULL;
	dma_buf_put(import->dmabuf);
	import->dmabuf = NULL;
	dma_set_mask(&import->engine->pdev->dev, DMA_BIT_MASK(64));
}

static int remember(struct import *import, struct sg_table *table)
{
	struct piece *pieces = kvcalloc(table->nents, sizeof(*pieces), GFP_KERNEL);
	struct scatterlist *entry;
	unsigned int i;

	if (!pieces)
		return -ENOMEM;
	for_each_sgtable_dma_sg(table, entry, i) {
		pieces[i].address = sg_dma_address(entry);
		pieces[i].length = sg_dma_len(entry);
	}
	kvfree(import->pieces);
	import->pieces = pieces;
	import->pieces_count = table->nents;
	return 0;
}

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

/* The reservation lock is held. */
static int map_now(struct import *import)
{
	struct sg_table *table;
	int error;
	u64 began;

	if (import->table)
		return -EBUSY;
	began = ktime_get_ns();
	table = dma_buf_map_attachment(import->attach, DMA_BIDIRECTIONAL);
	import->map_ns = ktime_get_ns() - began;
	if (IS_ERR(table))
		return PTR_ERR(table);
	import->pending = !dma_resv_test_signaled(import->dmabuf->resv, DMA_RESV_USAGE_KERNEL);
	import->table = table;
	error = remember(import, table);
	if (error)
		unmap_now(import);
	return error;
}

int import_map(struct import *import)
{
	int error;

	if (!import->attach)
		return -ENOTCONN;
	dma_resv_lock(import->dmabuf->resv, NULL);
	error = map_now(import);
	dma_resv_unlock(import->dmabuf->resv);
	return error;
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
		error = wait_for_contents(import) ?: map_now(import);
		dma_resv_unlock(import->dmabuf->resv);
	}
	if (error == -EBUSY)	/* by somebody else */
		return 0;
	import->fault_ns = ktime_get_ns() - began;
	import->faults += !error;
	return error;
}

void import_unmap(struct import *import)
{
	if (!import->attach)
		return;
	dma_resv_lock(import->dmabuf->resv, NULL);
	unmap_now(import);
	dma_resv_unlock(import->dmabuf->resv);
}

/* Keep the buffer busy (BOOKKEEP) until some time has gone by. */
int import_fence(struct import *import, unsigned int after_ms)
{
	struct dma_fence *fence;
	struct dma_resv *resv;

	if (!import->attach || import->fence)
		return import->fence ? -EBUSY : -ENOTCONN;
	resv = import->dmabuf->resv;
	dma_resv_lock(resv, NULL);
	fence = plain_fence_in(resv, DMA_RESV_USAGE_BOOKKEEP);
	dma_resv_unlock(resv);
	if (IS_ERR(fence))
		return PTR_ERR(fence);
	import->fence = fence;
	schedule_delayed_work(&import->signal, msecs_to_jiffies(after_ms));
	return 0;
}

/* What the exporter handed out, as it is in the table; nothing if it was taken back already. */
void import_say_table(struct import *import, struct answer *answer)
{
	struct scatterlist *entry;
	u64 total = 0;
	unsigned int i;

	dma_resv_lock(import->dmabuf->resv, NULL);
	if (import->table) {
		for_each_sgtable_dma_sg(import->table, entry, i)
			total += sg_dma_len(entry);
		say(answer, "entries=%u bytes=%llu errno=0\n", import->table->nents, total);
		for_each_sgtable_dma_sg(import->table, entry, i) {
			if (i == SHOWN_ENTRIES)
				break;
			say(answer, "address=0x%llx length=%u bus=%d page=%d\n",
			    (unsigned long long)sg_dma_address(entry), sg_dma_len(entry),
			    sg_dma_is_bus_address(entry), !!sg_page(entry));
		}
	} else {
		say_errno(answer, -ENODEV);
	}
	dma_resv_unlock(import->dmabuf->resv);
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

MODULE_IMPORT_NS("DMA_BUF");
