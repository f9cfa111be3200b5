/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef IMPORTER_H
#define IMPORTER_H

#include <linux/dma-buf.h>
#include <linux/dma-fence.h>
#include <linux/types.h>
#include <linux/workqueue.h>

#include "command_file.h"
#include "engine.h"

/* A piece of what was mapped last; remembered after the unmapping, for those that do not let go. */
struct piece {
	dma_addr_t address;
	u64 length;
};

/* How an importer behaves. */
struct manners {
	bool dynamic;		/* dma_buf_dynamic_attach() */
	bool peer2peer;		/* says that it can do without pages */
	bool revocable;		/* can be told that mappings end */
	bool pinned;
	bool ondemand;		/* maps when its device finds nothing mapped */
	bool stubborn;		/* is told, and unmaps nothing */
	bool hasty;		/* waits for no fence of memory management's */
	unsigned int delay_ms;	/* is told, and takes that long to unmap */
	unsigned int mask;	/* bits of its addresses */
};

/*
 * What one user imports: one buffer at a time.
 *
 * @table	mapped now; guarded by the buffer's reservation lock
 * @invalidated	how often we were told; guarded likewise
 * @pending	contents were still on their way when it was mapped last
 * @faults	how often the device found nothing mapped, and it was mapped for it
 */
struct import {
	struct engine *engine;
	struct manners manners;
	struct dma_buf *dmabuf;
	struct dma_buf_attachment *attach;
	struct sg_table *table;
	unsigned int invalidated;
	u64 map_ns, unmap_ns;		/* how long the last ones took */
	bool pending;
	unsigned int faults;
	u64 fault_ns, waited_ns;	/* the last one; the last wait for contents */
	struct delayed_work unmap;
	unsigned int pieces_count;
	struct piece *pieces;
	struct dma_fence *fence;
	struct delayed_work signal;
};

void import_init(struct import *import);
int import_attach(struct import *import, struct engine *engine, int fd,
		  const struct manners *manners);
void import_detach(struct import *import);
int import_map(struct import *import);
int import_map_locked(struct import *import);
void import_unmap(struct import *import);
int import_fence(struct import *import, unsigned int after_ms);
void import_say_table(struct import *import, struct answer *answer);
int import_dma(struct import *import, bool to_buffer, u64 offset, size_t size, bool stale);
int import_late(struct import *import, u64 offset, size_t size, unsigned int after_us,
		u64 *begun_ns, u64 *late_ns);
int import_cpu_pages(struct import *import, bool to_buffer, u64 offset, size_t size);
int import_cpu_vmap(struct import *import, bool to_buffer, u64 offset, size_t size);

#endif
