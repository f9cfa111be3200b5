// SPDX-License-Identifier: GPL-2.0-only
/*
 * QEMU's edu device as a copy engine (QEMU docs/specs/edu.rst): it moves up to 4 KiB between the
 * bus and a buffer of its own, a tenth of a second each way.
 */

#include <linux/dma-mapping.h>
#include <linux/iopoll.h>

#include "importer.h"

#define EDU_SOURCE	0x80
#define EDU_TARGET	0x88
#define EDU_COUNT	0x90
#define EDU_COMMAND	0x98
#define EDU_RUN		BIT(0)
#define EDU_TO_BUS	BIT(1)
#define EDU_BUFFER	0x40000

#define POLL_US		2000
#define TIMEOUT_US	(20 * USEC_PER_SEC)

static void write_register(struct engine *engine, unsigned int at, u64 value)
{
	writeq(value, engine->registers + at);
}

static int settle(struct engine *engine)
{
	u32 command;

	return readl_poll_timeout(engine->registers + EDU_COMMAND, command, !(command & EDU_RUN),
				  POLL_US, TIMEOUT_US);
}

static int move(struct engine *engine, u64 source, u64 target, size_t size, u64 direction)
{
	write_register(engine, EDU_SOURCE, source);
	write_register(engine, EDU_TARGET, target);
	write_register(engine, EDU_COUNT, size);
	write_register(engine, EDU_COMMAND, EDU_RUN | direction);
	return settle(engine);
}

int engine_open(struct engine *engine, struct pci_dev *pdev)
{
	int error = pcim_enable_device(pdev);

	if (error)
		return error;
	error = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (error)
		return error;
	engine->registers = pcim_iomap_region(pdev, 0, "dmabuf_importer");
	if (IS_ERR(engine->registers))
		return PTR_ERR(engine->registers);
	engine->bounce = dmam_alloc_coherent(&pdev->dev, BOUNCE_BYTES, &engine->bounce_at,
					     GFP_KERNEL);
	if (!engine->bounce)
		return -ENOMEM;
	engine->pdev = pdev;
	mutex_init(&engine->lock);
	pci_set_master(pdev);
	return settle(engine);
}

void engine_close(struct engine *engine)
{
	settle(engine);
	pci_clear_master(engine->pdev);
}

/* The device is not told of what an IOMMU refuses: 0 means that it has tried. */
int engine_copy(struct engine *engine, dma_addr_t from, dma_addr_t to, size_t size)
{
	int error = move(engine, from, EDU_BUFFER, size, 0);

	return error ?: move(engine, EDU_BUFFER, to, size, EDU_TO_BUS);
}
