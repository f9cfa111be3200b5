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

/*
 * How a buffer is exported.
 *
 * PAGES	peer-to-peer memory with struct pages (pci_p2pdma_add_resource()); the CPU may use it
 * PROVIDER	without pages, by a p2pdma_provider, as VFIO does it; devices only
 * MOVABLE	as PROVIDER while all importers can do with it, else in system memory, as GPUs do it
 * NULL_PAGE	wrong: as PROVIDER, but whoever asks for the CPU's sake is let in, too
 * BUS_ADDRESS	wrong: nothing is mapped; importers get the BAR's own address
 * NO_CHECK	wrong: mapped for anyone, whatever p2pdma thinks of the path
 */
enum mode { PAGES, PROVIDER, MOVABLE, NULL_PAGE, BUS_ADDRESS, NO_CHECK };

/*
 * One exported buffer. Below "mappings", everything is guarded by the reservation lock.
 *
 * @node	in the list of all; guarded by buffers_lock
 * @chunk	NO_CHECK: maps pieces of that size one by one; 0: each range at once
 * @live	its function is still ours
 * @memory	PAGES: where p2pmem was allocated
 * @system	MOVABLE: the same number of pages of system memory
 * @pins	MOVABLE: importers that must not see it move
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
int buffer_move(struct buffer *buffer, bool to_system, unsigned int timeout_ms);

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

#endif
