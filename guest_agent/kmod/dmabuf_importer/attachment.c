// SPDX-License-Identifier: GPL-2.0-only
/* An importer's side of a dma-buf: attach, map, be told that it ends. */

#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "importer.h"
#include "plain_fence.h"

#define SHOWN_ENTRIES	64

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

/* The reservation lock is held. */
int import_map_locked(struct import *import)
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
	error = import_map_locked(import);
	dma_resv_unlock(import->dmabuf->resv);
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

MODULE_IMPORT_NS("DMA_BUF");
