// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a device sees of a process's memory: found by hmm_range_fault(), mapped by
 * hmm_dma_map_pfn(), unmapped when the kernel says that it changes.
 *
 * Stock kernels have no way to use another owner's private page where it is: hmm_range_fault()
 * takes it back to system memory. What has been proposed (a callback of the pagemap's, by which
 * the owner names a peer-to-peer page of the same bytes) is done here: other owners' pages are
 * looked up first, as theirs and without a fault; if pci_p2pdma_distance_many() knows a way, the
 * owner's peer-to-peer page is mapped instead, by the kernel's own rule.
 */

#include <linux/mm.h>
#include <linux/sched/mm.h>

#include "peer.h"

#define ATTEMPTS	100

static bool invalidate(struct mmu_interval_notifier *notifier,
		       const struct mmu_notifier_range *range, unsigned long sequence)
{
	struct mirror *mirror = container_of(notifier, struct mirror, notifier);
	unsigned long i;

	if (mmu_notifier_range_blockable(range))
		mutex_lock(&mirror->lock);
	else if (!mutex_trylock(&mirror->lock))
		return false;
	mmu_interval_set_seq(notifier, sequence);
	for (i = 0; i < mirror->pages; i++) {
		unsigned long at = mirror->start + (i << PAGE_SHIFT);

		if (at < range->start || at >= range->end || !mirror->present[i])
			continue;
		hmm_dma_unmap_pfn(&mirror->engine->pdev->dev, &mirror->map, i);
		mirror->map.pfn_list[i] = 0;
		mirror->present[i] = false;
		mirror->told++;
	}
	mutex_unlock(&mirror->lock);
	return true;
}

static const struct mmu_interval_notifier_ops operations = {
	.invalidate = invalidate,
};

static int look(struct mirror *mirror, unsigned long sequence, unsigned long page, void *group,
		unsigned long flags, unsigned long *pfn)
{
	struct hmm_range range = {
		.notifier = &mirror->notifier,
		.notifier_seq = sequence,
		.start = mirror->start + (page << PAGE_SHIFT),
		.end = mirror->start + ((page + 1) << PAGE_SHIFT),
		.hmm_pfns = pfn,
		.default_flags = flags,
		.dev_private_owner = group,
	};
	int error;

	*pfn = 0;
	mmap_read_lock(mirror->notifier.mm);
	error = hmm_range_fault(&range);
	mmap_read_unlock(mirror->notifier.mm);
	return error;
}

static struct owner *private_owner(unsigned long pfn)
{
	struct page *page;

	if (!(pfn & HMM_PFN_VALID))
		return NULL;
	page = hmm_pfn_to_page(pfn);
	return is_device_private_page(page) ? owner_of(page) : NULL;
}

/* Another owner's page that the device reaches where it is: says so with a peer-to-peer page. */
static int find_peer(struct mirror *mirror, unsigned long sequence, unsigned long page,
		     unsigned long *pfn)
{
	struct device *device = &mirror->engine->pdev->dev;
	struct owner *owner;
	int error;

	list_for_each_entry(owner, &owners, node) {
		struct page *peer;

		if (owner == mirror->manners.group)
			continue;
		error = look(mirror, sequence, page, owner, 0, pfn);
		if (error)
			return error;
		if (private_owner(*pfn) != owner)
			continue;
		if (mirror->manners.fake)
			return 0;
		if (!mirror->manners.no_check &&
		    pci_p2pdma_distance_many(owner->pdev, &device, 1, false) < 0)
			break;
		peer = owner_dma_page(owner, hmm_pfn_to_page(*pfn));
		*pfn = (*pfn & HMM_PFN_FLAGS) | page_to_pfn(peer);
		return 0;
	}
	return -ENOENT;
}

static int find(struct mirror *mirror, unsigned long sequence, unsigned long page,
		unsigned long *pfn)
{
	int error = -ENOENT;

	if (mirror->manners.peer2peer)
		error = find_peer(mirror, sequence, page, pfn);
	if (error != -ENOENT)
		return error;
	return look(mirror, sequence, page, mirror->manners.group ?: mirror->engine,
		    HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE, pfn);
}

static int map(struct mirror *mirror, unsigned long page, unsigned long pfn)
{
	struct pci_p2pdma_map_state state = {};
	struct device *device = &mirror->engine->pdev->dev;
	dma_addr_t at;

	mirror->map.pfn_list[page] = pfn;
	if (private_owner(pfn) && !mirror->manners.fake) {
		/* Its own owner's: no address of the bus, an offset in video memory. */
		at = owner_offset(private_owner(pfn), hmm_pfn_to_page(pfn));
	} else if (mirror->manners.no_check && is_pci_p2pdma_page(hmm_pfn_to_page(pfn))) {
		at = page_to_phys(hmm_pfn_to_page(pfn));
	} else {
		at = hmm_dma_map_pfn(device, &mirror->map, page, &state);
		if (dma_mapping_error(device, at)) {
			mirror->map.pfn_list[page] = 0;
			return -EREMOTEIO;
		}
	}
	mirror->at[page] = at;
	mirror->present[page] = true;
	return 0;
}

/* One page, until it does not change under our hands. */
static int mirror_page(struct mirror *mirror, unsigned long page)
{
	unsigned long sequence, pfn;
	int error, attempt;

	for (attempt = 0; attempt < ATTEMPTS; attempt++) {
		sequence = mmu_interval_read_begin(&mirror->notifier);
		error = find(mirror, sequence, page, &pfn);
		if (error == -EBUSY)
			continue;
		if (error)
			return error;
		mutex_lock(&mirror->lock);
		if (!mmu_interval_read_retry(&mirror->notifier, sequence)) {
			error = map(mirror, page, pfn);
			mutex_unlock(&mirror->lock);
			return error;
		}
		mutex_unlock(&mirror->lock);
	}
	return -EBUSY;
}

int mirror_make(struct mirror *mirror, struct engine *engine, const struct manners *manners,
		unsigned long start, unsigned long pages)
{
	struct device *device = &engine->pdev->dev;
	unsigned long page;
	int error;

	mirror_end(mirror);
	error = hmm_dma_map_alloc(device, &mirror->map, pages, PAGE_SIZE);
	if (error)
		return error;
	mirror->engine = engine;
	mirror->manners = *manners;
	mirror->start = start;
	mirror->pages = pages;
	mirror->told = 0;
	error = mmu_interval_notifier_insert(&mirror->notifier, current->mm, start,
					     pages << PAGE_SHIFT, &operations);
	if (error) {
		hmm_dma_map_free(device, &mirror->map);
		return error;
	}
	mirror->active = true;
	for (page = 0; page < pages && !error; page++)
		error = mirror_page(mirror, page);
	if (error)
		mirror_end(mirror);
	return error;
}

void mirror_end(struct mirror *mirror)
{
	struct device *device;
	unsigned long i;

	if (!mirror->active)
		return;
	device = &mirror->engine->pdev->dev;
	mmu_interval_notifier_remove(&mirror->notifier);
	for (i = 0; i < mirror->pages; i++) {
		if (mirror->present[i])
			hmm_dma_unmap_pfn(device, &mirror->map, i);
		mirror->present[i] = false;
	}
	hmm_dma_map_free(device, &mirror->map);
	mirror->active = false;
}

static const char *kind_of(struct mirror *mirror, unsigned long pfn)
{
	if (private_owner(pfn))
		return "private";
	if (is_pci_p2pdma_page(hmm_pfn_to_page(pfn)))
		return "peer";
	return "system";
}

void mirror_say(struct mirror *mirror, struct answer *answer)
{
	unsigned long i;

	mutex_lock(&mirror->lock);
	say(answer, "errno=0 told=%u\n", mirror->told);
	for (i = 0; mirror->active && i < mirror->pages; i++) {
		unsigned long pfn = mirror->map.pfn_list[i];

		if (mirror->present[i])
			say(answer, "page=%lu address=%llu kind=%s bus=%d\n", i,
			    (unsigned long long)mirror->at[i], kind_of(mirror, pfn),
			    !!(pfn & HMM_PFN_P2PDMA_BUS));
		else
			say(answer, "page=%lu address=0 kind=none bus=0\n", i);
	}
	mutex_unlock(&mirror->lock);
}

/*
 * Let the device copy between its own memory and a page. "stale": by the address that it was given
 * last, whether that still holds or not. While it copies the page does not go.
 */
int mirror_dma(struct mirror *mirror, bool to_memory, unsigned long page, size_t size, bool stale)
{
	struct engine *engine = mirror->engine;
	int error = 0;

	if (!mirror->active)
		return -ENOTCONN;
	if (page >= mirror->pages || size > BOUNCE_BYTES)
		return -EINVAL;
	mutex_lock(&engine->lock);
	mutex_lock(&mirror->lock);
	if (!mirror->present[page] && !stale) {
		error = -ENODEV;
	} else if (mirror->present[page] && !mirror->manners.fake &&
		   private_owner(mirror->map.pfn_list[page])) {
		/* Only its own slot's memory is behind the device; to linked owners it has no link. */
		struct owner *owner = private_owner(mirror->map.pfn_list[page]);

		if (!engine->kind->copy_local || owner->pdev->bus != engine->pdev->bus ||
		    PCI_SLOT(owner->pdev->devfn) != PCI_SLOT(engine->pdev->devfn))
			error = -EOPNOTSUPP;
		else
			error = engine->kind->copy_local(engine, to_memory, mirror->at[page],
							 engine->bounce_at, size);
	} else if (to_memory) {
		error = engine->kind->copy(engine, engine->bounce_at, mirror->at[page], size);
	} else {
		error = engine->kind->copy(engine, mirror->at[page], engine->bounce_at, size);
	}
	mutex_unlock(&mirror->lock);
	mutex_unlock(&engine->lock);
	return error;
}
