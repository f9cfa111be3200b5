// SPDX-License-Identifier: GPL-2.0-only
/* The dma-buf side of a buffer: who may attach, what is mapped for whom, and taking it back. */

#include <linux/dma-resv.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "buffer.h"
#include "plain_fence.h"

DEFINE_MUTEX(buffers_lock);
LIST_HEAD(buffers);

struct buffer *buffer_of(struct dma_buf *dmabuf)
{
	return dmabuf->priv;
}

static bool reachable(struct buffer *buffer, struct device *device)
{
	return pci_p2pdma_distance_many(buffer->pdev, &device, 1, false) >= 0;
}

static bool can_use_vram(struct dma_buf_attachment *attach)
{
	return attach->peer2peer && reachable(buffer_of(attach->dmabuf), attach->dev);
}

#define ATTACH_MOVE_MS 2000
#define COPY_NOW (-1)

static int buffer_attach(struct dma_buf *dmabuf, struct dma_buf_attachment *attach)
{
	struct buffer *buffer = buffer_of(dmabuf);
	bool revoked, in_system;

	dma_resv_lock(dmabuf->resv, NULL);
	revoked = buffer->revoked || !buffer->live;
	in_system = buffer->in_system;
	dma_resv_unlock(dmabuf->resv);
	if (revoked)
		return -ENODEV;
	if (buffer->revocable && !dma_buf_attach_revocable(attach))
		return -EOPNOTSUPP;
	switch (buffer->mode) {
	case PAGES:
		return reachable(buffer, attach->dev) ? 0 : -EOPNOTSUPP;
	case PROVIDER:
	case WRAP_LENGTH:
	case WRAP_OFFSET:
		return can_use_vram(attach) ? 0 : -EOPNOTSUPP;
	case MOVABLE:
		if (can_use_vram(attach) || in_system)
			return 0;
		return buffer_move(buffer, true, ATTACH_MOVE_MS, COPY_NOW);
	default:
		return 0;
	}
}

static int buffer_pin(struct dma_buf_attachment *attach)
{
	/* A pin keeps it from moving. It is no protection from a revoke: attach has seen to that. */
	buffer_of(attach->dmabuf)->pins++;
	return 0;
}

static void buffer_unpin(struct dma_buf_attachment *attach)
{
	buffer_of(attach->dmabuf)->pins--;
}

static struct sg_table *map_table(struct buffer *buffer, struct dma_buf_attachment *attach,
				  enum dma_data_direction direction)
{
	struct sg_table *table;
	int error;

	if (buffer->mode == PAGES && !buffer->memory)
		return ERR_PTR(-ENODEV);
	if (buffer->mode == PAGES || buffer->in_system)
		return memory_map_pages(buffer, attach->dev, direction);
	if (buffer->mode == BUS_ADDRESS || buffer->mode == NO_CHECK)
		return memory_map_addresses(buffer, attach->dev, direction);
	if (buffer->mode == MOVABLE && !can_use_vram(attach))
		return ERR_PTR(-EBUSY);	/* it was moved back since this one attached */
	table = dma_buf_phys_vec_to_sgt(attach, buffer->provider, buffer->ranges, buffer->count,
					buffer->size, direction);
	if (IS_ERR(table) || (buffer->mode != WRAP_LENGTH && buffer->mode != WRAP_OFFSET))
		return table;
	error = wrap_table(buffer, table);
	if (!error)
		return table;
	dma_buf_free_sgt(attach, table, direction);
	return ERR_PTR(error);
}

static struct sg_table *buffer_map(struct dma_buf_attachment *attach,
				   enum dma_data_direction direction)
{
	struct buffer *buffer = buffer_of(attach->dmabuf);
	struct mapping *mapping;
	struct sg_table *table;

	if ((buffer->revoked && !(buffer->careless & KEEP_OPEN)) || !buffer->live)
		return ERR_PTR(-ENODEV);
	mapping = kzalloc(sizeof(*mapping), GFP_KERNEL);
	if (!mapping)
		return ERR_PTR(-ENOMEM);
	table = map_table(buffer, attach, direction);
	if (IS_ERR(table)) {
		kfree(mapping);
		return table;
	}
	mapping->attach = attach;
	mapping->table = table;
	mapping->in_system = buffer->in_system;
	list_add_tail(&mapping->node, &buffer->mappings);
	return table;
}

static void buffer_unmap(struct dma_buf_attachment *attach, struct sg_table *table,
			 enum dma_data_direction direction)
{
	struct buffer *buffer = buffer_of(attach->dmabuf);
	struct mapping *mapping, *next;
	bool provided = buffer->mode == PROVIDER || buffer->mode == NULL_PAGE ||
			buffer->mode == MOVABLE || buffer->mode == WRAP_LENGTH ||
			buffer->mode == WRAP_OFFSET;

	list_for_each_entry_safe(mapping, next, &buffer->mappings, node) {
		if (mapping->table != table)
			continue;
		if (provided && !mapping->in_system)
			dma_buf_free_sgt(attach, table, direction);
		else
			memory_unmap(buffer, attach->dev, table, direction);
		list_del(&mapping->node);
		kfree(mapping);
		wake_up_all(&buffer->unmapped);
		return;
	}
	WARN(1, "a table that was never mapped\n");
}

void buffer_free(struct buffer *buffer)
{
	buffer_end_copy(buffer);
	if (buffer->memory)
		pci_free_p2pmem(buffer->pdev, buffer->memory, buffer->size);
	memory_put_system(buffer);
	pci_dev_put(buffer->pdev);
	kfree(buffer);
}

static void buffer_release(struct dma_buf *dmabuf)
{
	struct buffer *buffer = buffer_of(dmabuf);

	mutex_lock(&buffers_lock);
	list_del(&buffer->node);
	mutex_unlock(&buffers_lock);
	buffer_free(buffer);
}

/* Without the CPU's operations the dma-buf core refuses mmap and vmap. */
const struct dma_buf_ops for_devices = {
	.attach = buffer_attach,
	.pin = buffer_pin,
	.unpin = buffer_unpin,
	.map_dma_buf = buffer_map,
	.unmap_dma_buf = buffer_unmap,
	.release = buffer_release,
};

const struct dma_buf_ops for_all = {
	.attach = buffer_attach,
	.pin = buffer_pin,
	.unpin = buffer_unpin,
	.map_dma_buf = buffer_map,
	.unmap_dma_buf = buffer_unmap,
	.release = buffer_release,
	.mmap = memory_mmap,
	.vmap = memory_vmap,
	.vunmap = memory_vunmap,
};

/*
 * Tell all importers, then wait for their fences and for their unmapping. The reservation lock is
 * held on entry and on return, and not while unmapping is waited for, which takes it.
 */
static struct released let_go(struct buffer *buffer, unsigned int timeout_ms)
{
	struct dma_resv *resv = buffer->dmabuf->resv;
	struct dma_buf_attachment *attach;
	struct released released = {};
	u64 began = ktime_get_ns();
	long left;

	list_for_each_entry(attach, &buffer->dmabuf->attachments, node)
		released.told += dma_buf_attach_revocable(attach);
	if (!(buffer->careless & NO_TELL))
		dma_buf_invalidate_mappings(buffer->dmabuf);
	if (buffer->careless & NO_WAIT)
		return released;
	left = dma_resv_wait_timeout(resv, DMA_RESV_USAGE_BOOKKEEP, false,
				     msecs_to_jiffies(timeout_ms));
	released.fences_ns = ktime_get_ns() - began;
	released.fences = left > 0 ? 0 : left ?: -ETIMEDOUT;
	dma_resv_unlock(resv);
	/* Only an emptied list counts; it is looked at again under the lock below. */
	wait_event_timeout(buffer->unmapped, list_empty_careful(&buffer->mappings),
			   msecs_to_jiffies(timeout_ms));
	dma_resv_lock(resv, NULL);
	released.unmaps_ns = ktime_get_ns() - began;
	released.unmaps = list_empty(&buffer->mappings) ? 0 : -ETIMEDOUT;
	return released;
}

struct released buffer_revoke(struct buffer *buffer, unsigned int timeout_ms)
{
	struct released released;

	dma_resv_lock(buffer->dmabuf->resv, NULL);
	buffer->revoked = true;
	released = let_go(buffer, timeout_ms);
	dma_resv_unlock(buffer->dmabuf->resv);
	return released;
}

/* Runs without the reservation lock: whoever has a mapping waits for the fence. */
void buffer_copy_later(struct work_struct *work)
{
	struct buffer *buffer = container_of(work, struct buffer, copy.work);
	int error = buffer->careless & NO_COPY ? 0 : memory_copy(buffer, buffer->in_system);

	if (buffer->careless & EARLY_FENCE)
		return;
	if (error)
		dma_fence_set_error(buffer->copying, error);
	dma_fence_signal(buffer->copying);
}

/* A copy that has not begun is not made any more; one that has is waited for. */
void buffer_end_copy(struct buffer *buffer)
{
	if (!buffer->copying)
		return;
	if (cancel_delayed_work_sync(&buffer->copy) && !dma_fence_is_signaled(buffer->copying)) {
		dma_fence_set_error(buffer->copying, -ENODEV);
		dma_fence_signal(buffer->copying);
	}
	dma_fence_put(buffer->copying);
	buffer->copying = NULL;
}

/* Called with the reservation lock held, like the copy at once. */
static int queue_copy(struct buffer *buffer, unsigned int copy_ms)
{
	struct dma_fence *fence;

	buffer_end_copy(buffer);	/* which has been waited for: its fence is in the reservation */
	fence = plain_fence_in(buffer->dmabuf->resv, DMA_RESV_USAGE_KERNEL);
	if (IS_ERR(fence))
		return PTR_ERR(fence);
	buffer->copying = fence;
	if (buffer->careless & EARLY_FENCE)
		dma_fence_signal(fence);
	schedule_delayed_work(&buffer->copy, msecs_to_jiffies(copy_ms));
	return 0;
}

/* A copy in "copy_ms" is queued behind a fence; COPY_NOW: it is made before this returns. */
static int copy_contents(struct buffer *buffer, bool to_system, int copy_ms)
{
	if (copy_ms != COPY_NOW)
		return queue_copy(buffer, copy_ms);
	return buffer->careless & NO_COPY ? 0 : memory_copy(buffer, to_system);
}

int buffer_move(struct buffer *buffer, bool to_system, unsigned int timeout_ms, int copy_ms)
{
	struct released released;
	int error = 0;

	dma_resv_lock(buffer->dmabuf->resv, NULL);
	if (!buffer->system)
		error = -EOPNOTSUPP;
	else if (!buffer->live)
		error = -ENODEV;
	else if (buffer->in_system == to_system)
		goto done;
	else if (buffer->pins && !(buffer->careless & IGNORE_PIN))
		error = -EBUSY;
	if (error)
		goto done;
	buffer->revoked = true;	/* so that nobody maps it meanwhile */
	released = let_go(buffer, timeout_ms);
	error = released.fences ?: released.unmaps ?: copy_contents(buffer, to_system, copy_ms);
	if (!error)
		buffer->in_system = to_system;
	buffer->revoked = false;
done:
	dma_resv_unlock(buffer->dmabuf->resv);
	return error;
}

MODULE_IMPORT_NS("DMA_BUF");
