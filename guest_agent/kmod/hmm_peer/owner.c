// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages of a process in video memory, as a GPU driver has them: migrated by migrate_vma_*(), taken
 * back by a page fault of the CPU's or of a device that may not have them.
 *
 * The bytes are copied by the CPU through the BAR, where a driver would use the GPU's copy engine.
 */

#include <linux/bitmap.h>
#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/slab.h>

#include "peer.h"

#define BYTES	((unsigned long)OWNER_PAGES << PAGE_SHIFT)

static const struct dev_pagemap_ops operations;

struct owner *owner_of(struct page *page)
{
	struct dev_pagemap *pgmap = page_pgmap(page);

	return pgmap->ops == &operations ? container_of(pgmap, struct owner, pgmap) : NULL;
}

static unsigned long number_of(struct owner *owner, struct page *page)
{
	return page_to_pfn(page) - PHYS_PFN(owner->pgmap.range.start);
}

static void *alias_of(struct owner *owner, struct page *page)
{
	return owner->alias + (number_of(owner, page) << PAGE_SHIFT);
}

struct page *owner_dma_page(struct owner *owner, struct page *page)
{
	return virt_to_page(alias_of(owner, page));
}

u64 owner_offset(struct owner *owner, struct page *page)
{
	return page_to_phys(owner_dma_page(owner, page)) -
	       pci_resource_start(owner->pdev, OWNER_BAR);
}

unsigned int owner_in_use(struct owner *owner)
{
	return bitmap_weight(owner->used, OWNER_PAGES);
}

/* A private page that nobody uses, locked and with a reference, or NULL. */
static struct page *get_page_of(struct owner *owner)
{
	unsigned long number;
	struct page *page;

	spin_lock(&owner->lock);
	number = find_first_zero_bit(owner->used, OWNER_PAGES);
	if (number < OWNER_PAGES)
		__set_bit(number, owner->used);
	spin_unlock(&owner->lock);
	if (number == OWNER_PAGES)
		return NULL;
	page = pfn_to_page(PHYS_PFN(owner->pgmap.range.start) + number);
	zone_device_page_init(page, &owner->pgmap, 0);
	return page;
}

static void folio_free(struct folio *folio)
{
	struct owner *owner = owner_of(&folio->page);

	spin_lock(&owner->lock);
	__clear_bit(number_of(owner, &folio->page), owner->used);
	spin_unlock(&owner->lock);
}

static void copy_out(struct owner *owner, struct page *to, struct page *from)
{
	memcpy_fromio(page_address(to), (void __iomem *)alias_of(owner, from), PAGE_SIZE);
}

static vm_fault_t migrate_to_ram(struct vm_fault *fault)
{
	struct owner *owner = owner_of(fault->page);
	unsigned long source = 0, target = 0;
	struct migrate_vma migration = {
		.vma = fault->vma,
		.src = &source,
		.dst = &target,
		.start = fault->address & PAGE_MASK,
		.end = (fault->address & PAGE_MASK) + PAGE_SIZE,
		.pgmap_owner = owner,
		.flags = MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
		.fault_page = fault->page,
	};
	struct page *page;

	if (migrate_vma_setup(&migration))
		return VM_FAULT_SIGBUS;
	if (source & MIGRATE_PFN_MIGRATE) {
		page = alloc_page_vma(GFP_HIGHUSER_MOVABLE, fault->vma, migration.start);
		if (page) {
			lock_page(page);
			copy_out(owner, page, migrate_pfn_to_page(source));
			target = migrate_pfn(page_to_pfn(page));
		}
	}
	migrate_vma_pages(&migration);
	if (source & MIGRATE_PFN_MIGRATE)
		atomic_inc(&owner->to_ram);
	migrate_vma_finalize(&migration);
	return 0;
}

static const struct dev_pagemap_ops operations = {
	.folio_free = folio_free,
	.migrate_to_ram = migrate_to_ram,
};

/* Migrate the calling process's pages into video memory; says where each went. */
int owner_take(struct owner *owner, struct answer *answer, unsigned long start,
	       unsigned long pages)
{
	unsigned long source[MIRROR_PAGES] = {}, target[MIRROR_PAGES] = {}, i, moved = 0;
	struct migrate_vma migration = {
		.src = source,
		.dst = target,
		.start = start,
		.end = start + (pages << PAGE_SHIFT),
		.pgmap_owner = owner,
		.flags = MIGRATE_VMA_SELECT_SYSTEM,
	};
	int error = -EFAULT;

	mmap_read_lock(current->mm);
	migration.vma = vma_lookup(current->mm, start);
	if (migration.vma && migration.end <= migration.vma->vm_end)
		error = migrate_vma_setup(&migration);
	if (error) {
		mmap_read_unlock(current->mm);
		return error;
	}
	for (i = 0; i < pages; i++) {
		struct page *from = migrate_pfn_to_page(source[i]), *to;

		if (!(source[i] & MIGRATE_PFN_MIGRATE))
			continue;
		to = get_page_of(owner);
		if (!to)
			continue;
		if (from)
			memcpy_toio((void __iomem *)alias_of(owner, to), page_address(from),
				    PAGE_SIZE);
		else
			memset_io((void __iomem *)alias_of(owner, to), 0, PAGE_SIZE);
		target[i] = migrate_pfn(page_to_pfn(to));
		if (source[i] & MIGRATE_PFN_WRITE)
			target[i] |= MIGRATE_PFN_WRITE;
	}
	migrate_vma_pages(&migration);
	for (i = 0; i < pages; i++)
		if (source[i] & MIGRATE_PFN_MIGRATE)
			moved++;
	say(answer, "errno=0 moved=%lu\n", moved);
	for (i = 0; i < pages; i++)
		if (source[i] & MIGRATE_PFN_MIGRATE)
			say(answer, "page=%lu offset=%llu\n", i,
			    owner_offset(owner, migrate_pfn_to_page(target[i])));
	migrate_vma_finalize(&migration);
	mmap_read_unlock(current->mm);
	return 0;
}

/* Every page back to system memory, of whatever process: the video memory ends. */
static void evict(struct owner *owner)
{
	unsigned long *source = kvcalloc(OWNER_PAGES, sizeof(*source), GFP_KERNEL | __GFP_NOFAIL);
	unsigned long *target = kvcalloc(OWNER_PAGES, sizeof(*target), GFP_KERNEL | __GFP_NOFAIL);
	unsigned long i;

	migrate_device_range(source, PHYS_PFN(owner->pgmap.range.start), OWNER_PAGES);
	for (i = 0; i < OWNER_PAGES; i++) {
		struct page *from = migrate_pfn_to_page(source[i]), *to;

		if (!from || !(source[i] & MIGRATE_PFN_MIGRATE))
			continue;
		to = alloc_page(GFP_HIGHUSER_MOVABLE | __GFP_NOFAIL);
		lock_page(to);
		copy_out(owner, to, from);
		target[i] = migrate_pfn(page_to_pfn(to));
		if (source[i] & MIGRATE_PFN_WRITE)
			target[i] |= MIGRATE_PFN_WRITE;
	}
	migrate_device_pages(source, target, OWNER_PAGES);
	migrate_device_finalize(source, target, OWNER_PAGES);
	kvfree(source);
	kvfree(target);
}

struct owner *owner_open(struct pci_dev *pdev)
{
	struct owner *owner;
	void *mapped;
	int error = pcim_enable_device(pdev);

	if (!error)
		error = pci_p2pdma_add_resource(pdev, OWNER_BAR, BYTES, 0);
	if (error)
		return ERR_PTR(error);
	owner = kzalloc(sizeof(*owner), GFP_KERNEL);
	if (!owner)
		return ERR_PTR(-ENOMEM);
	owner->pdev = pdev;
	spin_lock_init(&owner->lock);
	owner->alias = pci_alloc_p2pmem(pdev, BYTES);
	error = -ENOMEM;
	if (!owner->alias)
		goto free;
	owner->region = request_free_mem_region(&iomem_resource, BYTES, KBUILD_MODNAME);
	error = PTR_ERR_OR_ZERO(owner->region);
	if (error)
		goto free_alias;
	owner->pgmap.type = MEMORY_DEVICE_PRIVATE;
	owner->pgmap.ops = &operations;
	owner->pgmap.owner = owner;
	owner->pgmap.nr_range = 1;
	owner->pgmap.range.start = owner->region->start;
	owner->pgmap.range.end = owner->region->end;
	mapped = memremap_pages(&owner->pgmap, numa_node_id());
	error = PTR_ERR_OR_ZERO(mapped);
	if (error)
		goto release;
	return owner;

release:
	release_mem_region(owner->region->start, resource_size(owner->region));
free_alias:
	pci_free_p2pmem(pdev, owner->alias, BYTES);
free:
	kfree(owner);
	return ERR_PTR(error);
}

void owner_close(struct owner *owner)
{
	evict(owner);
	memunmap_pages(&owner->pgmap);
	release_mem_region(owner->region->start, resource_size(owner->region));
	pci_free_p2pmem(owner->pdev, owner->alias, BYTES);
	kfree(owner);
}
