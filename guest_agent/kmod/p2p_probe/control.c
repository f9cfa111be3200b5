// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the running kernel itself decides about peer-to-peer DMA between two PCI functions.
 *
 * No rule of drivers/pci/p2pdma.c is repeated here: the distance is the return value of
 * pci_p2pdma_distance_many(), and the kind of a mapping is what dma_map_sgtable() made of a page
 * of peer-to-peer memory.
 *
 * Interface: open /dev/p2p_probe, write one command, read its answer (lines of key=value words).
 *
 *   distance PROVIDER CLIENT...        a line for each client, and one for all of them
 *   provide PROVIDER BAR SIZE OFFSET   make a part of a BAR peer-to-peer memory; SIZE 0: the rest
 *   map PROVIDER CLIENT SIZE           map a piece of PROVIDER's memory for CLIENT, and unmap it
 *   publish PROVIDER 0|1               offer a provider's memory to "find", or no longer
 *   find CLIENT...                     the published provider that the kernel takes for them all
 *
 * Functions are named 0000:05:00.0. "provide" wants the function bound to the driver of this
 * module (driver_override p2p_probe); unbinding it takes the memory back.
 */

#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/iommu.h>
#include <linux/module.h>
#include <linux/pci-p2pdma.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "command_file.h"

static void say_distance(struct answer *answer, const char *name, int distance)
{
	if (distance < 0)
		say(answer, "client=%s distance=none\n", name);
	else
		say(answer, "client=%s distance=%d\n", name, distance);
}

static void put_clients(struct device **clients, int count)
{
	while (count--)
		put_device(clients[count]);
	kfree(clients);
}

/* The functions of those names, each with a reference, or an ERR_PTR. */
static struct device **get_clients(int count, char **words)
{
	struct device **clients = kcalloc(count, sizeof(*clients), GFP_KERNEL);
	int i;

	if (!clients)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < count; i++) {
		struct pci_dev *pdev = named_function(words[i]);

		if (IS_ERR(pdev)) {
			put_clients(clients, i);
			return ERR_CAST(pdev);
		}
		clients[i] = &pdev->dev;
	}
	return clients;
}

static int do_distance(void *context, struct answer *answer, int count, char **words)
{
	struct pci_dev *provider;
	struct device **clients;
	int i;

	if (count < 2)
		return -EINVAL;
	provider = named_function(words[0]);
	if (IS_ERR(provider))
		return PTR_ERR(provider);
	count--;
	words++;
	clients = get_clients(count, words);
	if (IS_ERR(clients)) {
		pci_dev_put(provider);
		return PTR_ERR(clients);
	}
	for (i = 0; i < count; i++)
		say_distance(answer, words[i],
			     pci_p2pdma_distance_many(provider, &clients[i], 1, false));
	say_distance(answer, "all", pci_p2pdma_distance_many(provider, clients, count, false));
	put_clients(clients, count);
	pci_dev_put(provider);
	return 0;
}

static int do_find(void *context, struct answer *answer, int count, char **words)
{
	struct device **clients;
	struct pci_dev *provider;

	if (!count)
		return -EINVAL;
	clients = get_clients(count, words);
	if (IS_ERR(clients))
		return PTR_ERR(clients);
	provider = pci_p2pmem_find_many(clients, count);
	say(answer, "provider=%s\n", provider ? pci_name(provider) : "none");
	pci_dev_put(provider);
	put_clients(clients, count);
	return 0;
}

static int do_publish(void *context, struct answer *answer, int count, char **words)
{
	struct pci_dev *provider;
	bool publish;

	if (count != 2 || kstrtobool(words[1], &publish))
		return -EINVAL;
	provider = named_function(words[0]);
	if (IS_ERR(provider))
		return PTR_ERR(provider);
	device_lock(&provider->dev);
	pci_p2pmem_publish(provider, publish);
	device_unlock(&provider->dev);
	pci_dev_put(provider);
	return 0;
}

static int do_provide(void *context, struct answer *answer, int count, char **words)
{
	unsigned long long size, offset;
	struct pci_dev *pdev;
	unsigned int bar;
	int error;

	if (count != 4 || kstrtouint(words[1], 0, &bar) || bar >= PCI_STD_NUM_BARS ||
	    kstrtoull(words[2], 0, &size) || kstrtoull(words[3], 0, &offset))
		return -EINVAL;
	pdev = named_function(words[0]);
	if (IS_ERR(pdev))
		return PTR_ERR(pdev);
	device_lock(&pdev->dev);
	error = is_ours(pdev) ? pci_p2pdma_add_resource(pdev, bar, size, offset) : -EPERM;
	device_unlock(&pdev->dev);
	if (!error)
		say(answer, "start=0x%llx\n",
		    (unsigned long long)pci_resource_start(pdev, bar) + offset);
	pci_dev_put(pdev);
	return error;
}

/* DMA by the kernel is possible: the function is in no domain of a VFIO user's. */
static int check_client(struct pci_dev *client, bool *translated)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(&client->dev);

	*translated = domain && (domain->type & __IOMMU_DOMAIN_DMA_API);
	if (!domain || *translated || domain->type == IOMMU_DOMAIN_IDENTITY)
		return 0;
	return -EBUSY;
}

static void say_mapping(struct answer *answer, struct sg_table *table, phys_addr_t physical,
			bool translated)
{
	const char *kind = translated ? "iova" : "physical";

	/* The kernel's own mark of an address that no IOMMU translates (linux/scatterlist.h). */
	if (sg_dma_is_bus_address(table->sgl))
		kind = "bus";
	say(answer, "type=%s error=0 address=0x%llx physical=0x%llx\n", kind,
	    (unsigned long long)sg_dma_address(table->sgl), (unsigned long long)physical);
}

static int map_for(struct answer *answer, struct pci_dev *client, struct page *page, size_t size)
{
	u64 mask = client->dma_mask;
	struct sg_table table;
	bool translated;
	int error;

	error = check_client(client, &translated);
	if (error)
		return error;
	error = sg_alloc_table(&table, 1, GFP_KERNEL);
	if (error)
		return error;
	sg_set_page(table.sgl, page, size, 0);
	/* Without a driver nobody has said yet how wide the function's addresses are. */
	if (!client->dev.driver)
		dma_set_mask(&client->dev, DMA_BIT_MASK(64));
	error = dma_map_sgtable(&client->dev, &table, DMA_BIDIRECTIONAL, 0);
	if (error) {
		say(answer, "type=refused error=%d address=0 physical=0x%llx\n", -error,
		    (unsigned long long)page_to_phys(page));
	} else {
		say_mapping(answer, &table, page_to_phys(page), translated);
		dma_unmap_sgtable(&client->dev, &table, DMA_BIDIRECTIONAL, 0);
	}
	if (!client->dev.driver)
		dma_set_mask(&client->dev, mask);
	sg_free_table(&table);
	return 0;
}

static int do_map(void *context, struct answer *answer, int count, char **words)
{
	struct pci_dev *provider, *client;
	unsigned int size;
	void *memory;
	int error;

	if (count != 3 || kstrtouint(words[2], 0, &size) || !size || size % PAGE_SIZE)
		return -EINVAL;
	provider = named_function(words[0]);
	if (IS_ERR(provider))
		return PTR_ERR(provider);
	client = named_function(words[1]);
	if (IS_ERR(client)) {
		pci_dev_put(provider);
		return PTR_ERR(client);
	}
	memory = pci_alloc_p2pmem(provider, size);
	if (memory) {
		device_lock(&client->dev);
		error = map_for(answer, client, virt_to_page(memory), size);
		device_unlock(&client->dev);
		pci_free_p2pmem(provider, memory, size);
	} else {
		error = -ENXIO;
	}
	pci_dev_put(client);
	pci_dev_put(provider);
	return error;
}

static const struct command commands[] = {
	{ "distance", do_distance },
	{ "provide", do_provide },
	{ "map", do_map },
	{ "publish", do_publish },
	{ "find", do_find },
	{},
};

/* Taken only through driver_override. What "provide" adds goes with the binding (devres). */
static int driver_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	return pcim_enable_device(pdev);
}

static struct pci_driver driver = {
	.name = KBUILD_MODNAME,
	.probe = driver_probe,
};

const struct command_file command_file = {
	.commands = commands,
	.driver = &driver,
};

MODULE_DESCRIPTION("What the kernel decides about peer-to-peer DMA");
MODULE_LICENSE("GPL");
