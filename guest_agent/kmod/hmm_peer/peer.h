/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef PEER_H
#define PEER_H

#include <linux/hmm-dma.h>
#include <linux/hmm.h>
#include <linux/list.h>
#include <linux/memremap.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/pci-p2pdma.h>
#include <linux/pci.h>

#include "command_file.h"
#include "engine.h"

#define OWNER_BAR	2
#define OWNER_PAGES	512	/* 2 MiB: what a pagemap has at least */
#define MIRROR_PAGES	16

/*
 * Video memory that processes' pages can migrate into: device-private pages, which no CPU can
 * address, each with a page of peer-to-peer memory of the BAR that holds its bytes.
 *
 * @pgmap	the private pages; its "owner" is this
 * @alias	where the CPU sees the bytes; page by page the private pages' own
 * @used	which private pages are; guarded by lock
 * @to_ram	pages that a fault has taken back
 */
struct owner {
	struct list_head node;
	struct pci_dev *pdev;
	struct dev_pagemap pgmap;
	struct resource *region;
	void *alias;
	spinlock_t lock;
	DECLARE_BITMAP(used, OWNER_PAGES);
	atomic_t to_ram;
};

/* Guarded by the control lock, which page faults do not take. */
extern struct list_head owners;

struct owner *owner_open(struct pci_dev *pdev);
void owner_close(struct owner *owner);
int owner_take(struct owner *owner, struct answer *answer, unsigned long start,
	       unsigned long pages);
unsigned int owner_in_use(struct owner *owner);

/* The owner of a private page, or NULL: it is none of ours. */
struct owner *owner_of(struct page *page);
/* Where in the BAR its bytes are. */
u64 owner_offset(struct owner *owner, struct page *page);
/* The peer-to-peer page that other devices reach the same bytes by. */
struct page *owner_dma_page(struct owner *owner, struct page *page);

/* How a mirroring device treats private pages of other owners. */
struct manners {
	void *group;		/* whose pages it takes for its own; NULL: nobody's */
	bool peer2peer;		/* asks other owners for peer-to-peer pages */
	bool no_check;		/* wrong: whatever p2pdma thinks of the path, and by bus address */
	bool fake;		/* wrong: maps the private page, which has no memory */
};

/*
 * A range of one process's memory as a device sees it.
 *
 * @lock	guards what follows
 * @map		its "pfn_list" says what is mapped, and how
 * @at		addresses that the device was given last, mapped or not
 * @told	how often the kernel said that a page has changed
 */
struct mirror {
	struct engine *engine;
	struct mmu_interval_notifier notifier;
	struct manners manners;
	bool active;
	unsigned long start, pages;

	struct mutex lock;
	struct hmm_dma_map map;
	dma_addr_t at[MIRROR_PAGES];
	bool present[MIRROR_PAGES];
	unsigned int told;
};

int mirror_make(struct mirror *mirror, struct engine *engine, const struct manners *manners,
		unsigned long start, unsigned long pages);
void mirror_end(struct mirror *mirror);
void mirror_say(struct mirror *mirror, struct answer *answer);
int mirror_dma(struct mirror *mirror, bool to_memory, unsigned long page, size_t size, bool stale);

#endif
