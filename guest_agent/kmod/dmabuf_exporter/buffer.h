/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef BUFFER_H
#define BUFFER_H

#include <linux/dma-buf.h>
#include <linux/dma-buf-mapping.h>
#include <linux/list.h>
#include <linux/pci-p2pdma.h>
#include <linux/pci.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

/*
 * How a buffer is exported.
 *
 * PAGES	peer-to-peer memory with struct pages (pci_p2pdma_add_resource()); the CPU may use it
 * PROVIDER	without pages, by a p2pdma_provider, as VFIO does it; devices only
 * MOVABLE	as PROVIDER while all importers can do with it, else in system memory, as GPUs do it
 * NULL_PAGE	wrong: as PROVIDER, but whoever asks for the CPU's sake is let in, too
 * BUS_ADDRESS	wrong: nothing is mapped; importers get the BAR's own address
 * NO_CHECK	wrong: mapped for anyone, whatever p2pdma thinks of the path
 * WRAP_LENGTH	wrong: as PROVIDER, of whose lists lengths had 32 bits until they were mended
 * WRAP_OFFSET	wrong: as PROVIDER, of whose lists offsets had 32 bits until they were mended
 */
enum mode {
	PAGES, PROVIDER, MOVABLE, NULL_PAGE, BUS_ADDRESS, NO_CHECK, WRAP_LENGTH, WRAP_OFFSET
};

/*
 * What else an exporter does wrong, on purpose.
 *
 * NO_TELL	importers are not told that their mappings end
 * NO_WAIT	neither fences nor unmapping are waited for
 * KEEP_OPEN	what was revoked can be mapped again
 * IGNORE_PIN	what is pinned moves
 * NO_COPY	a move leaves the contents behind
 * EARLY_FENCE	a move's fence signals before its copy is made
 */
enum careless {
	NO_TELL = BIT(0),
	NO_WAIT = BIT(1),
	KEEP_OPEN = BIT(2),
	IGNORE_PIN = BIT(3),
	NO_COPY = BIT(4),
	EARLY_FENCE = BIT(5),
};

/*
 * One exported buffer. Below "mappings", everything is guarded by the reservation lock.
 *
 * @node	in the list of all; guarded by buffers_lock
 * @chunk	NO_CHECK: maps pieces of that size one by one; 0: each range at once
 * @live	its function is still ours
 * @memory	PAGES: where p2pmem was allocated
 * @system	MOVABLE: the same number of pages of system memory
 * @pins	MOVABLE: importers that must not see it move
 * @copy	MOVABLE: copies the contents to where the buffer is by then
 * @copying	signals when that is done; memory management's (KERNEL) in the reservation
 */
struct buffer {
	struct list_head node;
	struct pci_dev *pdev;
	struct dma_buf *dmabuf;
	struct p2pdma_provider *provider;
	enum mode mode;
	bool revocable;
	size_t chunk;
	void *memory;
	struct page **system;
	size_t size;
	wait_queue_head_t unmapped;

	struct list_head mappings;
	bool live;
	bool revoked;
	bool in_system;
	unsigned int pins;
	unsigned int careless;
	struct delayed_work copy;
	struct dma_fence *copying;
	unsigned int count;
	struct phys_vec ranges[] __counted_by(count);
};

/* One importer's mapping, for naming who does not let go. */
struct mapping {
	struct list_head node;
	struct dma_buf_attachment *attach;
	struct sg_table *table;
	bool in_system;
};

/* How long importers took, and what was not over when time was up. */
struct released {
	unsigned int told;
	long fences, unmaps;
	u64 fences_ns, unmaps_ns;
};

extern struct mutex buffers_lock;
extern struct list_head buffers;
extern const struct dma_buf_ops for_devices, for_all;

struct buffer *buffer_of(struct dma_buf *dmabuf);
void buffer_free(struct buffer *buffer);
struct released buffer_revoke(struct buffer *buffer, unsigned int timeout_ms);
int buffer_move(struct buffer *buffer, bool to_system, unsigned int timeout_ms, int copy_ms);
void buffer_copy_later(struct work_struct *work);
void buffer_end_copy(struct buffer *buffer);

int memory_get_system(struct buffer *buffer);
void memory_put_system(struct buffer *buffer);
int memory_copy(struct buffer *buffer, bool to_system);
int memory_mmap(struct dma_buf *dmabuf, struct vm_area_struct *vma);
int memory_vmap(struct dma_buf *dmabuf, struct iosys_map *map);
void memory_vunmap(struct dma_buf *dmabuf, struct iosys_map *map);
struct sg_table *memory_map_pages(struct buffer *buffer, struct device *device,
				  enum dma_data_direction direction);
struct sg_table *memory_map_addresses(struct buffer *buffer, struct device *device,
				      enum dma_data_direction direction);
void memory_unmap(struct buffer *buffer, struct device *device, struct sg_table *table,
		  enum dma_data_direction direction);

int wrap_table(struct buffer *buffer, struct sg_table *table);

#endif
