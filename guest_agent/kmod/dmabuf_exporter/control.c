// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exports parts of a PCI function's BAR as dma-bufs, rightly and in well-known wrong ways.
 *
 * Interface: open /dev/dmabuf_exporter, write one command, read its answer.
 *
 *   export FUNCTION BAR MODE REVOCABLE CHUNK OFFSET:LENGTH...	→ fd size offset
 *   revoke FD MS		no more mappings; wait for fences and unmapping
 *   restore FD			mappings again
 *   move FD vram|system MS [COPY_MS]	a movable buffer; with COPY_MS its contents follow that much
 *				later, behind a fence
 *   state FD			who has it mapped, and where it is
 *   careless FD WORD...		do more things wrong: no-tell no-wait keep-open ignore-pin no-copy
 *				early-fence (buffer.h)
 *   abandon FD			wrong: give its pages away while others have them mapped
 *
 * MODE is pages, provider, movable, or one of the wrong ones: null-page, bus-address, no-check,
 * wrap-length, wrap-offset (buffer.h); CHUNK is for no-check: how much it maps at once, 0 for all.
 * With REVOCABLE 1 only importers that can be told of a revoke may attach. Of pages the kernel
 * chooses the offset. A function is driven by this module through driver_override; unbinding it
 * revokes all its buffers, for good.
 */

#include <linux/dma-resv.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "buffer.h"
#include "command_file.h"

#define MAX_RANGES	64
#define PAGES_BYTES	(16UL << 20)	/* of a BAR, made peer-to-peer memory: pages cost memory */
#define UNBIND_MS	5000

static const char * const mode_names[] = {
	[PAGES] = "pages",
	[PROVIDER] = "provider",
	[MOVABLE] = "movable",
	[NULL_PAGE] = "null-page",
	[BUS_ADDRESS] = "bus-address",
	[NO_CHECK] = "no-check",
	[WRAP_LENGTH] = "wrap-length",
	[WRAP_OFFSET] = "wrap-offset",
};

static const char * const careless_names[] = {
	"no-tell", "no-wait", "keep-open", "ignore-pin", "no-copy", "early-fence",
};

static int parse_ranges(struct buffer *buffer, int bar, char **words)
{
	resource_size_t start = pci_resource_start(buffer->pdev, bar);
	resource_size_t length = pci_resource_len(buffer->pdev, bar);
	unsigned int i;

	for (i = 0; i < buffer->count; i++) {
		unsigned long long offset, size;
		char after;

		if (sscanf(words[i], "%llu:%llu%c", &offset, &size, &after) != 2)
			return -EINVAL;
		if (!size || !PAGE_ALIGNED(offset | size) || offset > length ||
		    size > length - offset)
			return -EINVAL;
		buffer->ranges[i].paddr = start + offset;
		buffer->ranges[i].len = size;
		buffer->size += size;
	}
	return 0;
}

/* Peer-to-peer memory of the function, which gets some when this is first asked for. */
static int get_pages(struct buffer *buffer, int bar)
{
	resource_size_t start = pci_resource_start(buffer->pdev, bar);
	bool *added = pci_get_drvdata(buffer->pdev);
	int error;

	if (buffer->count != 1)
		return -EINVAL;
	if (!*added) {
		size_t size = min_t(u64, PAGES_BYTES, pci_resource_len(buffer->pdev, bar));

		error = pci_p2pdma_add_resource(buffer->pdev, bar, size, 0);
		if (error)
			return error;
		*added = true;
	}
	buffer->memory = pci_alloc_p2pmem(buffer->pdev, buffer->size);
	if (!buffer->memory)
		return -ENOMEM;
	buffer->ranges[0].paddr = page_to_phys(virt_to_page(buffer->memory));
	return buffer->ranges[0].paddr < start ? -EINVAL : 0;
}

static int export(struct buffer *buffer)
{
	bool cpu = buffer->mode == PAGES || buffer->mode == NULL_PAGE;
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct dma_buf *dmabuf;
	int fd;

	info.ops = cpu ? &for_all : &for_devices;
	info.size = buffer->size;
	info.flags = O_RDWR | O_CLOEXEC;
	info.priv = buffer;
	dmabuf = dma_buf_export(&info);
	if (IS_ERR(dmabuf)) {
		buffer_free(buffer);
		return PTR_ERR(dmabuf);
	}
	buffer->dmabuf = dmabuf;
	mutex_lock(&buffers_lock);
	list_add_tail(&buffer->node, &buffers);
	mutex_unlock(&buffers_lock);
	fd = dma_buf_fd(dmabuf, O_CLOEXEC);
	if (fd < 0)
		dma_buf_put(dmabuf);
	return fd;
}

static int prepare(struct buffer *buffer, int bar, char **words)
{
	int error = parse_ranges(buffer, bar, words);

	if (error)
		return error;
	buffer->provider = pcim_p2pdma_provider(buffer->pdev, bar);
	if (!buffer->provider)
		return -EINVAL;
	if (buffer->mode == PAGES)
		return get_pages(buffer, bar);
	if (buffer->mode == MOVABLE)
		return memory_get_system(buffer);
	return 0;
}

static int do_export(void *context, struct answer *answer, int count, char **words)
{
	struct buffer *buffer;
	struct pci_dev *pdev;
	unsigned int bar, chunk;
	int mode, fd;
	bool revocable;

	if (count < 6 || count - 5 > MAX_RANGES || kstrtouint(words[1], 0, &bar) ||
	    bar >= PCI_STD_NUM_BARS || kstrtobool(words[3], &revocable) ||
	    kstrtouint(words[4], 0, &chunk) || !PAGE_ALIGNED(chunk))
		return -EINVAL;
	mode = match_string(mode_names, ARRAY_SIZE(mode_names), words[2]);
	if (mode < 0)
		return -EINVAL;
	pdev = named_function(words[0]);
	if (IS_ERR(pdev))
		return PTR_ERR(pdev);
	buffer = kzalloc(struct_size(buffer, ranges, count - 5), GFP_KERNEL);
	if (!buffer) {
		pci_dev_put(pdev);
		return -ENOMEM;
	}
	buffer->count = count - 5;
	buffer->chunk = chunk;
	buffer->pdev = pdev;
	buffer->mode = mode;
	buffer->revocable = revocable;
	buffer->live = true;
	INIT_LIST_HEAD(&buffer->mappings);
	init_waitqueue_head(&buffer->unmapped);
	INIT_DELAYED_WORK(&buffer->copy, buffer_copy_later);

	device_lock(&pdev->dev);
	fd = is_ours(pdev) ? prepare(buffer, bar, words + 5) : -EPERM;
	if (fd)
		buffer_free(buffer);
	else
		fd = export(buffer);
	/* From here on the buffer is its file's. */
	if (fd >= 0)
		say(answer, "fd=%d size=%zu offset=%llu errno=0\n", fd, buffer->size,
		    (unsigned long long)(buffer->ranges[0].paddr - pci_resource_start(pdev, bar)));
	else
		say_errno(answer, fd);
	device_unlock(&pdev->dev);
	return 0;
}

DEFINE_FREE(buffer_put, struct buffer *, if (!IS_ERR_OR_NULL(_T)) dma_buf_put(_T->dmabuf))

/* The buffer behind a file of ours, with a reference to it, or an ERR_PTR. */
static struct buffer *buffer_by_fd(const char *word)
{
	struct dma_buf *dmabuf;
	int fd;

	if (kstrtoint(word, 0, &fd))
		return ERR_PTR(-EINVAL);
	dmabuf = dma_buf_get(fd);
	if (IS_ERR(dmabuf))
		return ERR_CAST(dmabuf);
	if (dmabuf->ops != &for_devices && dmabuf->ops != &for_all) {
		dma_buf_put(dmabuf);
		return ERR_PTR(-EINVAL);
	}
	return buffer_of(dmabuf);
}

static void say_mappings(struct answer *answer, struct buffer *buffer)
{
	struct mapping *mapping;

	dma_resv_lock(buffer->dmabuf->resv, NULL);
	say(answer, "mapped=");
	list_for_each_entry(mapping, &buffer->mappings, node)
		say(answer, "%s%s", mapping->node.prev == &buffer->mappings ? "" : ",",
		    dev_name(mapping->attach->dev));
	say(answer, " revoked=%d in_system=%d pins=%u copying=%d\n", buffer->revoked,
	    buffer->in_system, buffer->pins,
	    buffer->copying && !dma_fence_is_signaled(buffer->copying));
	dma_resv_unlock(buffer->dmabuf->resv);
}

static int do_revoke(void *context, struct answer *answer, int count, char **words)
{
	struct released released;
	unsigned int timeout_ms;

	if (count != 2 || kstrtouint(words[1], 0, &timeout_ms))
		return -EINVAL;
	struct buffer *buffer __free(buffer_put) = buffer_by_fd(words[0]);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	released = buffer_revoke(buffer, timeout_ms);
	say(answer, "told=%u fences=%ld unmaps=%ld fences_ns=%llu unmaps_ns=%llu ", released.told,
	    -released.fences, -released.unmaps, released.fences_ns, released.unmaps_ns);
	say_mappings(answer, buffer);
	return 0;
}

static int do_restore(void *context, struct answer *answer, int count, char **words)
{
	if (count != 1)
		return -EINVAL;
	struct buffer *buffer __free(buffer_put) = buffer_by_fd(words[0]);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	dma_resv_lock(buffer->dmabuf->resv, NULL);
	buffer->revoked = false;
	dma_resv_unlock(buffer->dmabuf->resv);
	say_errno(answer, 0);
	return 0;
}

static int do_move(void *context, struct answer *answer, int count, char **words)
{
	unsigned int timeout_ms;
	int copy_ms = -1;

	if (count < 3 || count > 4 || kstrtouint(words[2], 0, &timeout_ms) ||
	    (count == 4 && (kstrtoint(words[3], 0, &copy_ms) || copy_ms < 0)) ||
	    (strcmp(words[1], "vram") && strcmp(words[1], "system")))
		return -EINVAL;
	struct buffer *buffer __free(buffer_put) = buffer_by_fd(words[0]);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	say_errno(answer, buffer_move(buffer, !strcmp(words[1], "system"), timeout_ms, copy_ms));
	return 0;
}

static int do_careless(void *context, struct answer *answer, int count, char **words)
{
	unsigned int careless = 0;
	int i, which;

	if (count < 2)
		return -EINVAL;
	for (i = 1; i < count; i++) {
		which = match_string(careless_names, ARRAY_SIZE(careless_names), words[i]);
		if (which < 0)
			return -EINVAL;
		careless |= BIT(which);
	}
	struct buffer *buffer __free(buffer_put) = buffer_by_fd(words[0]);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	dma_resv_lock(buffer->dmabuf->resv, NULL);
	buffer->careless = careless;
	dma_resv_unlock(buffer->dmabuf->resv);
	say_errno(answer, 0);
	return 0;
}

static int do_abandon(void *context, struct answer *answer, int count, char **words)
{
	if (count != 1)
		return -EINVAL;
	struct buffer *buffer __free(buffer_put) = buffer_by_fd(words[0]);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	dma_resv_lock(buffer->dmabuf->resv, NULL);
	if (buffer->memory)
		pci_free_p2pmem(buffer->pdev, buffer->memory, buffer->size);
	buffer->memory = NULL;
	dma_resv_unlock(buffer->dmabuf->resv);
	say_errno(answer, 0);
	return 0;
}

static int do_state(void *context, struct answer *answer, int count, char **words)
{
	if (count != 1)
		return -EINVAL;
	struct buffer *buffer __free(buffer_put) = buffer_by_fd(words[0]);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	say_mappings(answer, buffer);
	return 0;
}

static const struct command commands[] = {
	{ "export", do_export },
	{ "revoke", do_revoke },
	{ "restore", do_restore },
	{ "move", do_move },
	{ "state", do_state },
	{ "careless", do_careless },
	{ "abandon", do_abandon },
	{},
};

static int driver_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	bool *added = devm_kzalloc(&pdev->dev, sizeof(*added), GFP_KERNEL);
	int error = pcim_enable_device(pdev);

	if (!added)
		return -ENOMEM;
	pci_set_drvdata(pdev, added);
	return error ?: pcim_p2pdma_init(pdev);
}

static void driver_remove(struct pci_dev *pdev)
{
	struct buffer *buffer;

	mutex_lock(&buffers_lock);
	list_for_each_entry(buffer, &buffers, node) {
		if (buffer->pdev != pdev || !buffer->live)
			continue;
		if (buffer_revoke(buffer, UNBIND_MS).unmaps)
			pci_err(pdev, "a buffer is still mapped by its importers\n");
		dma_resv_lock(buffer->dmabuf->resv, NULL);
		buffer->live = false;
		buffer->provider = NULL;
		dma_resv_unlock(buffer->dmabuf->resv);
		buffer_end_copy(buffer);
		if (buffer->memory)
			pci_free_p2pmem(pdev, buffer->memory, buffer->size);
		buffer->memory = NULL;
	}
	mutex_unlock(&buffers_lock);
}

static struct pci_driver driver = {
	.name = KBUILD_MODNAME,
	.probe = driver_probe,
	.remove = driver_remove,
};

const struct command_file command_file = {
	.commands = commands,
	.driver = &driver,
};

MODULE_DESCRIPTION("Exports parts of a BAR as dma-bufs, rightly and wrongly");
MODULE_LICENSE("GPL");
