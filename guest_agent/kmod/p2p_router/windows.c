// SPDX-License-Identifier: GPL-2.0-only
/* The windows that initiators and their peers ask for, in the DMA domains of the initiators. */

#include <linux/iommu.h>
#include <linux/list.h>
#include <linux/pci.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/string.h>

#include "router.h"

/* One initiator and one BAR that it may reach below the IOMMU. */
struct pair {
	struct iommu_domain *domain;
	int group;
	dma_addr_t start, end;		/* whole pages; end is the first byte after */
	phys_addr_t physical;
	int bar;
	char initiator[16], peer[16];
};

struct window {
	struct list_head list;
	struct iommu_domain *domain;
	int group;
	dma_addr_t start, end;
	phys_addr_t physical;
	int error;			/* why it is not installed */
	bool wanted;
};

static LIST_HEAD(windows);
static struct pair *pairs;
static size_t pair_count, pair_room;

struct iommu_domain *translating_domain(struct pci_dev *pdev)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(&pdev->dev);

	return domain && (domain->type & __IOMMU_DOMAIN_DMA_API) ? domain : NULL;
}

static int add_pair(struct pci_dev *initiator, struct iommu_domain *domain, int group,
		    struct pci_dev *peer, int bar)
{
	struct pair *pair;

	if (pair_count == pair_room) {
		size_t room = pair_room ? 2 * pair_room : 64;
		struct pair *more = krealloc_array(pairs, room, sizeof(*pairs), GFP_KERNEL);

		if (!more)
			return -ENOMEM;
		pairs = more;
		pair_room = room;
	}
	pair = &pairs[pair_count++];
	pair->domain = domain;
	pair->group = group;
	pair->start = ALIGN_DOWN(pci_bus_address(peer, bar), PAGE_SIZE);
	pair->end = ALIGN(pci_bus_address(peer, bar) + pci_resource_len(peer, bar), PAGE_SIZE);
	pair->physical = ALIGN_DOWN(pci_resource_start(peer, bar), PAGE_SIZE);
	pair->bar = bar;
	strscpy(pair->initiator, pci_name(initiator), sizeof(pair->initiator));
	strscpy(pair->peer, pci_name(peer), sizeof(pair->peer));
	return 0;
}

static int add_pairs(struct pci_dev *initiator, const struct pci_dev *leaving)
{
	struct iommu_domain *domain = translating_domain(initiator);
	struct pci_dev *peer = NULL;
	struct iommu_group *group;
	int number, bar;

	if (!domain)
		return 0;	/* bus addresses pass as they are */
	group = iommu_group_get(&initiator->dev);
	number = iommu_group_id(group);
	iommu_group_put(group);
	for_each_pci_dev(peer) {
		if (peer == initiator || peer == leaving ||
		    peer->hdr_type != PCI_HEADER_TYPE_NORMAL || !routed(initiator, peer))
			continue;
		for (bar = 0; bar < PCI_STD_NUM_BARS; bar++)
			if (is_reachable(peer, bar) &&
			    add_pair(initiator, domain, number, peer, bar)) {
				pci_dev_put(peer);
				return -ENOMEM;
			}
	}
	return 0;
}

static int by_window(const void *left, const void *right)
{
	const struct pair *a = left, *b = right;

	if (a->domain != b->domain)
		return a->domain < b->domain ? -1 : 1;
	if (a->start != b->start)
		return a->start < b->start ? -1 : 1;
	return a->end < b->end ? -1 : a->end > b->end;
}

/* The window as the pairs want it: found among the present ones, or a new one. */
static int want(struct iommu_domain *domain, int group, dma_addr_t start, dma_addr_t end,
		phys_addr_t physical)
{
	struct window *window;

	list_for_each_entry(window, &windows, list)
		if (window->domain == domain && window->start == start && window->end == end) {
			window->wanted = true;
			return 0;
		}
	window = kzalloc(sizeof(*window), GFP_KERNEL);
	if (!window)
		return -ENOMEM;
	window->domain = domain;
	window->group = group;
	window->start = start;
	window->end = end;
	window->physical = physical;
	window->error = 1;	/* not yet */
	window->wanted = true;
	list_add_tail(&window->list, &windows);
	return 0;
}

/* Overlapping pairs (BARs that share a page, initiators that share a group) are one window. */
static int want_all(void)
{
	size_t first, next;
	int error = 0;

	sort(pairs, pair_count, sizeof(*pairs), by_window, NULL);
	for (first = 0; first < pair_count && !error; first = next) {
		dma_addr_t end = pairs[first].end;

		for (next = first + 1; next < pair_count; next++) {
			if (pairs[next].domain != pairs[first].domain || pairs[next].start >= end)
				break;
			end = max(end, pairs[next].end);
		}
		error = want(pairs[first].domain, pairs[first].group, pairs[first].start, end,
			     pairs[first].physical);
	}
	return error;
}

static void install(struct window *window)
{
	size_t size = window->end - window->start;

	if (iommu_iova_to_phys(window->domain, window->start))
		window->error = -EEXIST;
	else
		window->error = iommu_map(window->domain, window->start, window->physical, size,
					  IOMMU_READ | IOMMU_WRITE | IOMMU_MMIO, GFP_KERNEL);
	if (window->error)
		pr_err(KBUILD_MODNAME ": window %pad of group %d: error %d\n", &window->start,
		       window->group, window->error);
}

static void drop(struct window *window)
{
	if (!window->error)
		iommu_unmap(window->domain, window->start, window->end - window->start);
	list_del(&window->list);
	kfree(window);
}

void windows_update(struct list_head *initiators, const struct pci_dev *leaving)
{
	struct window *window, *more;
	struct initiator *initiator;
	int error = 0;

	pair_count = 0;
	list_for_each_entry(window, &windows, list)
		window->wanted = false;
	list_for_each_entry(initiator, initiators, list)
		error = error ?: add_pairs(initiator->pdev, leaving);
	error = error ?: want_all();
	if (error)
		pr_err(KBUILD_MODNAME ": error %d; some pairs are not routed\n", error);
	list_for_each_entry_safe(window, more, &windows, list)
		if (!window->wanted)
			drop(window);
	list_for_each_entry(window, &windows, list)
		if (window->error)
			install(window);
}

void windows_show(struct seq_file *file)
{
	struct window *window;
	size_t i;

	list_for_each_entry(window, &windows, list)
		seq_printf(file, "window group=%d start=0x%llx size=0x%llx error=%d\n",
			   window->group, (unsigned long long)window->start,
			   (unsigned long long)(window->end - window->start), -window->error);
	for (i = 0; i < pair_count; i++)
		seq_printf(file, "pair initiator=%s peer=%s bar=%d start=0x%llx size=0x%llx\n",
			   pairs[i].initiator, pairs[i].peer, pairs[i].bar,
			   (unsigned long long)pairs[i].start,
			   (unsigned long long)(pairs[i].end - pairs[i].start));
}

void windows_free(void)
{
	kfree(pairs);
}
