// SPDX-License-Identifier: GPL-2.0-only
/* What all devices that copy have in common: registers, memory, addresses of full width. */

#include <linux/dma-mapping.h>

#include "engine.h"

static const struct engine_kind * const kinds[] = { &edu_kind, &gpu_model_kind };

static const struct engine_kind *kind_of(struct pci_dev *pdev)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(kinds); i++)
		if (pdev->vendor == kinds[i]->vendor && pdev->device == kinds[i]->device)
			return kinds[i];
	return NULL;
}

int engine_open(struct engine *engine, struct pci_dev *pdev)
{
	int error;

	engine->kind = kind_of(pdev);
	if (!engine->kind)
		return -ENODEV;
	error = pcim_enable_device(pdev);
	if (error)
		return error;
	error = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (error)
		return error;
	engine->registers = pcim_iomap_region(pdev, 0, KBUILD_MODNAME);
	if (IS_ERR(engine->registers))
		return PTR_ERR(engine->registers);
	engine->bounce = dmam_alloc_coherent(&pdev->dev, BOUNCE_BYTES, &engine->bounce_at,
					     GFP_KERNEL);
	engine->scratch = dmam_alloc_coherent(&pdev->dev, PAGE_SIZE, &engine->scratch_at,
					      GFP_KERNEL);
	if (!engine->bounce || !engine->scratch)
		return -ENOMEM;
	engine->pdev = pdev;
	mutex_init(&engine->lock);
	pci_set_master(pdev);
	error = engine->kind->start(engine);
	if (error)
		pci_clear_master(pdev);
	return error;
}

void engine_close(struct engine *engine)
{
	engine->kind->stop(engine);
	pci_clear_master(engine->pdev);
}
