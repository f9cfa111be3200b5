/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A fence that its maker signals, and nothing else. Between that and the module's end lies a grace
 * period of RCU (command_file.c), as dma-fence.h wants it: a fence names functions of the module.
 */
#ifndef PLAIN_FENCE_H
#define PLAIN_FENCE_H

#include <linux/dma-fence.h>
#include <linux/dma-resv.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static const char *plain_fence_name(struct dma_fence *fence)
{
	return KBUILD_MODNAME;
}

static const struct dma_fence_ops plain_fence_ops = {
	.get_driver_name = plain_fence_name,
	.get_timeline_name = plain_fence_name,
};

static DEFINE_SPINLOCK(plain_fence_lock);

/* A fence in a reservation, whose lock is held, and a reference to it; or an ERR_PTR. */
static inline struct dma_fence *plain_fence_in(struct dma_resv *resv, enum dma_resv_usage usage)
{
	struct dma_fence *fence = kzalloc(sizeof(*fence), GFP_KERNEL);
	int error;

	if (!fence)
		return ERR_PTR(-ENOMEM);
	dma_fence_init(fence, &plain_fence_ops, &plain_fence_lock, dma_fence_context_alloc(1), 1);
	error = dma_resv_reserve_fences(resv, 1);
	if (error) {
		dma_fence_signal(fence);
		dma_fence_put(fence);
		return ERR_PTR(error);
	}
	dma_resv_add_fence(resv, fence, usage);
	return fence;
}

#endif
