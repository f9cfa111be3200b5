// SPDX-License-Identifier: GPL-2.0-only
/* A buffer's memory: as pages, as addresses without pages, and as the CPU sees it. */

#include <linux/dma-mapping.h>
#include <linux/highmem.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "buffer.h"

static unsigned int system_pages(const struct buffer *buffer)
{
	return buffer->size >> PAGE_SHIFT;
}

int memory_get_system(struct buffer *buffer)
{
	unsigned int count = system_pages(buffer), i;

	buffer->system = kvcalloc(count, sizeof(*buffer->system), GFP_KERNEL);
	if (!buffer->system)
		return -ENOMEM;
	for (i = 0; i < count; i++) {
		buffer->system[i] = alloc_page(GFP_KERNEL | __GFP_ZERO);
		if (!buffer->system[i]) {
			memory_put_system(buffer);
			return -ENOMEM;
		}
	}
	return 0;
}

void memory_put_system(struct buffer *buffer)
{
	unsigned int i;

	if (!buffer->system)
		return;
	for (i = 0; i < system_pages(buffer); i++)
		if (buffer->system[i])
			__free_page(buffer->system[i]);
	kvfree(buffer->system);
	buffer->system = NULL;
}

/* Between the BAR and system memory, with the CPU: nobody may use the buffer meanwhile. */
int memory_copy(struct buffer *buffer, bool to_system)
{
	struct page **page = buffer->system;
	unsigned int i;
	size_t done;

	for (i = 0; i < buffer->count; i++) {
		void __iomem *bar = ioremap(buffer->ranges[i].paddr, buffer->ranges[i].len);

		if (!bar)
			return -ENOMEM;
		for (done = 0; done < buffer->ranges[i].len; done += PAGE_SIZE, page++) {
			if (to_system)
				memcpy_fromio(page_address(*page), bar + done, PAGE_SIZE);
			else
				memcpy_toio(bar + done, page_address(*page), PAGE_SIZE);
		}
		iounmap(bar);
	}
	return 0;
}

int memory_mmap(struct dma_buf *dmabuf, struct vm_area_struct *vma)
{
	struct buffer *buffer = buffer_of(dmabuf);
	unsigned long skip = vma->vm_pgoff << PAGE_SHIFT, at = vma->vm_start;
	unsigned int i;
	int error;

	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	for (i = 0; i < buffer->count && at < vma->vm_end; i++) {
		struct phys_vec range = buffer->ranges[i];
		unsigned long size;

		if (skip >= range.len) {
			skip -= range.len;
			continue;
		}
		size = min(range.len - skip, vma->vm_end - at);
		error = io_remap_pfn_range(vma, at, PHYS_PFN(range.paddr + skip), size,
					   vma->vm_page_prot);
		if (error)
			return error;
		at += size;
		skip = 0;
	}
	return 0;
}

int memory_vmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	struct buffer *buffer = buffer_of(dmabuf);
	void __iomem *bar;

	if (buffer->count != 1)
		return -EOPNOTSUPP;
	bar = ioremap(buffer->ranges[0].paddr, buffer->ranges[0].len);
	if (!bar)
		return -ENOMEM;
	iosys_map_set_vaddr_iomem(map, bar);
	return 0;
}

void memory_vunmap(struct dma_buf *dmabuf, struct iosys_map *map)
{
	iounmap(map->vaddr_iomem);
}

static struct sg_table *new_table(unsigned int entries)
{
	struct sg_table *table = kzalloc(sizeof(*table), GFP_KERNEL);
	int error;

	if (!table)
		return ERR_PTR(-ENOMEM);
	error = sg_alloc_table(table, entries, GFP_KERNEL);
	if (error) {
		kfree(table);
		return ERR_PTR(error);
	}
	return table;
}

static void free_table(struct sg_table *table)
{
	sg_free_table(table);
	kfree(table);
}

/* The pages of PAGES, or of MOVABLE in system memory, mapped as the kernel maps any pages. */
struct sg_table *memory_map_pages(struct buffer *buffer, struct device *device,
				  enum dma_data_direction direction)
{
	struct sg_table *table = new_table(buffer->memory ? 1 : system_pages(buffer));
	struct scatterlist *entry;
	unsigned int i;
	int error;

	if (IS_ERR(table))
		return table;
	if (buffer->memory)
		sg_set_page(table->sgl, virt_to_page(buffer->memory), buffer->size, 0);
	else
		for_each_sgtable_sg(table, entry, i)
			sg_set_page(entry, buffer->system[i], PAGE_SIZE, 0);
	error = dma_map_sgtable(device, table, direction, 0);
	if (error) {
		free_table(table);
		return ERR_PTR(error);
	}
	return table;
}

static unsigned int pieces_of(const struct buffer *buffer)
{
	unsigned int i, pieces = 0;

	for (i = 0; i < buffer->count; i++)
		pieces += buffer->chunk ? DIV_ROUND_UP(buffer->ranges[i].len, buffer->chunk) : 1;
	return pieces;
}

/*
 * What the two careless exporters hand out: an entry without a page for each range or piece of one,
 * at an address that is either the BAR's own or mapped without a question.
 */
struct sg_table *memory_map_addresses(struct buffer *buffer, struct device *device,
				      enum dma_data_direction direction)
{
	unsigned int pieces = pieces_of(buffer), range = 0, i;
	struct sg_table *table = new_table(pieces);
	struct scatterlist *entry;
	size_t done = 0;

	if (IS_ERR(table))
		return table;
	for_each_sgtable_sg(table, entry, i) {
		size_t left = buffer->ranges[range].len - done;
		size_t size = buffer->chunk ? min(left, buffer->chunk) : left;
		dma_addr_t address = buffer->ranges[range].paddr + done;

		if (buffer->mode == NO_CHECK) {
			address = dma_map_phys(device, address, size, direction, DMA_ATTR_MMIO);
			if (dma_mapping_error(device, address))
				break;
		}
		sg_set_page(entry, NULL, 0, 0);
		sg_dma_address(entry) = address;
		sg_dma_len(entry) = size;
		done = size < left ? done + size : 0;
		range += !done;
	}
	table->nents = i;
	if (i < pieces) {
		memory_unmap(buffer, device, table, direction);
		return ERR_PTR(-EIO);
	}
	return table;
}

void memory_unmap(struct buffer *buffer, struct device *device, struct sg_table *table,
		  enum dma_data_direction direction)
{
	struct scatterlist *entry;
	unsigned int i;

	if (buffer->mode == PAGES || buffer->mode == MOVABLE)
		dma_unmap_sgtable(device, table, direction, 0);
	else if (buffer->mode == NO_CHECK)
		for_each_sgtable_dma_sg(table, entry, i)
			dma_unmap_phys(device, sg_dma_address(entry), sg_dma_len(entry), direction,
				       DMA_ATTR_MMIO);
	free_table(table);
}
