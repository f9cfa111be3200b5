/* SPDX-License-Identifier: GPL-2.0-only */
/* Devices that do DMA, driven: for the modules that want one. */
#ifndef ENGINE_H
#define ENGINE_H

#include <linux/mutex.h>
#include <linux/pci.h>

#define BOUNCE_BYTES	4096

struct engine;

/* What is particular to a kind of device. "copy": by bus addresses; -EIO if it says it could not. */
struct engine_kind {
	u16 vendor, device;
	int (*start)(struct engine *engine);
	void (*stop)(struct engine *engine);
	int (*copy)(struct engine *engine, dma_addr_t from, dma_addr_t to, size_t size);
	/* Between an offset in video memory of its own and the bus; NULL without such memory. */
	int (*copy_local)(struct engine *engine, bool to_local, u64 local, dma_addr_t bus,
			  size_t size);
	/* As "copy", in two halves: what is written is written when the second ends. NULL: cannot. */
	int (*begin)(struct engine *engine, dma_addr_t from, dma_addr_t to, size_t size);
	int (*finish)(struct engine *engine);
};

/* A device that does DMA, and memory of its own that it copies from and to. */
struct engine {
	const struct engine_kind *kind;
	struct pci_dev *pdev;
	void __iomem *registers;
	struct mutex lock;	/* one copy at a time */
	void *bounce;
	dma_addr_t bounce_at;
	void *scratch;		/* a page for the kind's own use */
	dma_addr_t scratch_at;
	u32 tail, fence;	/* gpu_model.c */
};

extern const struct engine_kind edu_kind, gpu_model_kind;

int engine_open(struct engine *engine, struct pci_dev *pdev);
void engine_close(struct engine *engine);

#endif
